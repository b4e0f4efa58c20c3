// What the page does in the browser; tabs.py calls these by name.
const charrnn = (() => {
  const $ = (css) => document.querySelector(css);
  let stopped = false;

  function toggleTheme() {
    const dark = document.body.classList.toggle('dark');
    localStorage.setItem('charrnn-theme', dark ? 'dark' : 'light');
  }

  // A theme in the address takes precedence over the one chosen last.
  function restoreTheme() {
    const chosen = localStorage.getItem('charrnn-theme');
    if (chosen && !new URLSearchParams(location.search).has('__theme')) {
      document.body.classList.toggle('dark', chosen === 'dark');
    }
  }

  // Gradio reports a cancelled generation as a failure: `failed` tells the two apart.
  const hint = () => $('#metrics .hint')?.innerText ?? '';
  function started() { stopped = false; }
  function stop() { stopped = true; return hint(); }
  function failed() { return stopped ? hint() : null; }

  // A disabled button loses the focus; the other one takes it over.
  function focusStop() { $('#stop').focus({ preventScroll: true }); }
  function focusGenerate() {
    if ([document.body, $('#stop')].includes(document.activeElement)) $('#generate').focus({ preventScroll: true });
  }

  function copyBySelection(prompt) {
    const range = document.createRange();
    range.setStartBefore(prompt);
    range.setEndAfter(prompt.nextSibling || prompt);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    return document.execCommand('copy');
  }

  // navigator.clipboard is missing without TLS (off loopback), and may be forbidden.
  async function copy() {
    const prompt = $('#paper .prompt'), button = $('#copy');
    let label = 'No text yet';
    if (prompt) {
      const text = prompt.textContent + (prompt.nextSibling?.textContent ?? '');
      const fallback = () => copyBySelection(prompt);
      const done = navigator.clipboard ? await navigator.clipboard.writeText(text).then(() => true, fallback) : fallback();
      label = done ? 'Copied' : 'Not copied';
    }
    button.textContent = label;
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  }

  // The candidates of the character under the pointer or in focus; the arrow keys move from character to character.
  const tip = document.createElement('div');
  tip.id = 'tip';
  tip.setAttribute('role', 'tooltip');
  const characterAt = (event) => event.target.closest?.('.reading i');
  function hideTip() { tip.style.display = 'none'; }

  function tipRow(line, highlighted) {
    const row = document.createElement('div');
    row.append(...line.split('\t').map((part) => Object.assign(document.createElement('span'), { textContent: part })));
    if (highlighted) row.className = 'this';
    return row;
  }

  function showTip(event) {
    const character = characterAt(event);
    if (!character) return hideTip();
    const lines = character.dataset.tip.split('\n');
    const name = lines[0].split('\t')[0];
    tip.replaceChildren(...lines.map((line, i) => tipRow(line, i > 0 && line.split('\t')[0] === name)));
    if (!tip.isConnected) document.body.append(tip);
    tip.style.display = 'block';
    const box = character.getClientRects()[0], below = box.bottom + 6;
    const rightmost = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(box.left, rightmost))}px`;
    tip.style.top = `${below + tip.offsetHeight < innerHeight ? below : box.top - tip.offsetHeight - 6}px`;
  }

  function moveByKey(event) {
    const character = characterAt(event);
    if (!character) return;
    if (event.key === 'Escape') hideTip();
    const next = { ArrowRight: character.nextElementSibling, ArrowLeft: character.previousElementSibling }[event.key];
    if (next) { next.focus(); event.preventDefault(); }
  }

  for (const type of ['mouseover', 'focusin', 'click']) document.addEventListener(type, showTip);
  document.addEventListener('scroll', hideTip, true);
  document.addEventListener('keydown', moveByKey);

  return { toggleTheme, restoreTheme, started, stop, failed, focusStop, focusGenerate, copy };
})();
