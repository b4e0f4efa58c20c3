"""How the page looks, in its light and its dark theme, and its little scripts. Nothing is loaded from elsewhere."""

from typing import Any

CSS = """
:root {
  --s0: transparent; --s1: #fef9c3; --s2: #fef08a; --s3: #fde047; --s4: #fdba74;
  --s5: #fb923c; --s6: #f87171; --s7: #f472b6; --s8: #e879f9;
  --faint: #64748b; --bar-before: #94a3b8; --bar-after: #4f46e5; --wrong: #b91c1c; --written: #0f172a;
}
.dark {
  --s1: #3d391f; --s2: #574b12; --s3: #735a08; --s4: #8a430c;
  --s5: #9a3412; --s6: #a61b2b; --s7: #9d174d; --s8: #86198f;
  --faint: #94a3b8; --bar-before: #64748b; --bar-after: #818cf8; --wrong: #fca5a5; --written: #f1f5f9;
  color-scheme: dark;
}
.gradio-container { max-width: 1180px !important; width: 100% !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
.dark input[type=range] { --neutral-200: #475569; }
footer { display: none !important; }

input[type=range]::-webkit-slider-thumb { border: 1px solid var(--faint) !important; }
input[type=range]::-moz-range-thumb { border: 1px solid var(--faint) !important; }

#head { align-items: center; gap: 12px; }
#head .block { border: 0; }
#model { max-width: 380px; border: 1px solid var(--border-color-primary) !important; border-radius: 8px; }
#head .title { font-size: 1.7rem; font-weight: 700; letter-spacing: -.02em; line-height: 1.2; margin: 0; }
#theme { flex: 0 0 auto !important; height: 40px; }
#names { gap: 2px; }
#about { min-height: 24px; }
.hint, .figures, .problem, .mean, .keys, .legend { margin: 0; font-size: .9rem; line-height: 1.5; color: var(--faint); }
.mean b { color: var(--written); }
.problem { color: var(--wrong); font-weight: 500; overflow-wrap: anywhere; }
button[role=tab][aria-selected=true] { color: var(--bar-after) !important; }
.figures { display: flex; flex-wrap: wrap; gap: 2px 20px; font-variant-numeric: tabular-nums; }

.panes { display: grid !important; gap: 16px; align-items: start;
  grid-template-columns: minmax(280px, 1fr) minmax(0, 2fr); grid-template-rows: auto 1fr;
  grid-template-areas: "asked shown" "options shown"; }
.panes > * { min-width: 0 !important; }
.panes > .asked { grid-area: asked; }
.panes > .shown { grid-area: shown; }
.panes > .options { grid-area: options; }

#paper, .reading { font-family: var(--font-mono); font-size: .95rem; line-height: 1.6; white-space: pre-wrap;
  overflow-wrap: anywhere; color: var(--written); }
#paper { height: 560px; min-height: 560px; overflow: hidden auto !important; scrollbar-gutter: stable;
  padding: 16px 20px;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary); border-radius: 12px;
  /* Turned over, a box keeps its lower end in sight while it grows. */
  display: flex; flex-direction: column-reverse; }
#paper > * { margin-bottom: auto; width: 100%; }
#paper .prompt { color: var(--bar-after); font-weight: 600; }
#written-line { min-height: 28px; flex-wrap: nowrap; align-items: center; }

.reading { margin-top: 12px; padding: 16px 20px; min-height: 200px; line-height: 1.9;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary); border-radius: 12px; }
.reading i { font-style: normal; padding: 2px 0; border-radius: 2px; cursor: help; }
.reading i:hover, .reading i:focus { outline: 2px solid var(--bar-after); outline-offset: 0; }
.reading u { text-decoration: none; font-size: .8em; }
.reading .hint { font-family: var(--font); }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 2px; }
.legend span { margin-right: 8px; }
.legend i { font-style: normal; min-width: 28px; text-align: center; border-radius: 3px; color: var(--written);
  font-size: .8rem; line-height: 22px; }
.legend .s0 { border: 1px solid var(--border-color-primary); line-height: 20px; }
.s0 { background: var(--s0); } .s1 { background: var(--s1); } .s2 { background: var(--s2); }
.s3 { background: var(--s3); } .s4 { background: var(--s4); } .s5 { background: var(--s5); }
.s6 { background: var(--s6); } .s7 { background: var(--s7); } .s8 { background: var(--s8); }

#tip { position: fixed; z-index: 1000; width: 190px; padding: 10px 12px; border-radius: 8px; display: none;
  background: #0f172a; color: #f1f5f9; border: 1px solid #475569; font: .82rem/1.5 var(--font-mono);
  box-shadow: 0 8px 24px rgb(0 0 0 / .25); pointer-events: none; }
#tip div { display: flex; justify-content: space-between; }
#tip div:first-child { border-bottom: 1px solid #475569; margin-bottom: 4px; padding-bottom: 4px; font-weight: 700; }
#tip div.this { color: #fde047; }

.bars { list-style: none; margin: 10px 0 0; padding: 16px 20px; font-variant-numeric: tabular-nums;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary); border-radius: 12px; }
.bars li { display: grid; grid-template-columns: 4.4em minmax(0, 1fr) 3.6em 3.6em; gap: 8px; align-items: center;
  height: 21px; margin: 0; font-size: .85rem; color: var(--written); }
.bars b { font-family: var(--font-mono); white-space: nowrap; text-align: right; }
.bars li > span { text-align: right; }
.bars li > span:nth-child(3) { color: var(--faint); }
.bars li.cut :is(b, span) { color: var(--faint) !important; }
.bars li.cut b { font-weight: 400; }
.pair i { display: block; height: 6px; min-width: 1px; border-radius: 0 3px 3px 0; margin: 1px 0; }
li.cut .after { min-width: 0; }
.before { background: var(--bar-before); }
.after { background: var(--bar-after); }
.keys { display: flex; gap: 20px; }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  margin-right: 6px; vertical-align: -1px; }

@media (max-width: 768px) {
  .panes { grid-template-columns: minmax(0, 1fr); grid-template-rows: none;
    grid-template-areas: "asked" "shown" "options"; }
  /* What the sliders do should be in sight while they are moved. */
  .panes.sliders-first { grid-template-areas: "asked" "options" "shown"; }
  #paper { height: 340px; min-height: 340px; padding: 12px; }
  .reading, .bars { padding: 12px; }
  .legend i { min-width: 22px; }
  #written-line { min-height: 48px; }
}
"""

# Gradio confines CSS to what is inside of `.fillable`, so that its own rules have to come by another way. The script:
# the candidates of the character under the pointer or in focus; the arrow keys go from character to character.
HEAD = """<style>
.gradio-container .fillable { max-width: none !important; padding: 16px 24px !important; }
html:has(body.dark), body.dark { background: var(--body-background-fill, #0b0f19); }
/* Gradio leaves some of its fields without a sign of the focus. */
html body .gradio-container :is(button, input, textarea):focus-visible,
html body .gradio-container #model:focus-within { outline: 2px solid #4f46e5 !important; outline-offset: 2px; }
html body.dark .gradio-container :is(button, input, textarea):focus-visible,
html body.dark .gradio-container #model:focus-within { outline-color: #a5b4fc !important; }
html body .gradio-container #model input:focus-visible { outline: none !important; }
html body .gradio-container button.reset-button:focus-visible { outline-offset: -2px; }
@media (max-width: 768px) { .gradio-container .fillable { padding: 8px 14px !important; } }
</style>
<script>
(() => {
  const tip = document.createElement('div');
  tip.id = 'tip';
  tip.setAttribute('role', 'tooltip');
  const mark = (event) => event.target.closest ? event.target.closest('.reading i') : null;
  const hide = () => { tip.style.display = 'none'; };
  const line = (text, mine) => {
    const row = document.createElement('div');
    row.append(...text.split('\\t').map((part) => {
      const cell = document.createElement('span');
      cell.textContent = part;
      return cell;
    }));
    if (mine) row.className = 'this';
    return row;
  };
  const show = (event) => {
    const at = mark(event);
    if (!at) return hide();
    const lines = at.dataset.tip.split('\\n');
    const name = lines[0].split('\\t')[0];
    tip.replaceChildren(...lines.map((text, i) => line(text, i > 0 && text.split('\\t')[0] === name)));
    if (!tip.isConnected) document.body.append(tip);
    tip.style.display = 'block';
    const box = at.getClientRects()[0], width = tip.offsetWidth, height = tip.offsetHeight;
    const below = box.bottom + 6;
    tip.style.left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 8)) + 'px';
    tip.style.top = (below + height < window.innerHeight ? below : box.top - height - 6) + 'px';
  };
  document.addEventListener('mouseover', show);
  document.addEventListener('focusin', show);
  document.addEventListener('click', show);
  document.addEventListener('scroll', hide, true);
  document.addEventListener('keydown', (event) => {
    const at = mark(event);
    if (!at) return;
    if (event.key === 'Escape') hide();
    const next = { ArrowRight: at.nextElementSibling, ArrowLeft: at.previousElementSibling }[event.key];
    if (next) { next.focus(); event.preventDefault(); }
  });
})();
</script>"""

TOGGLE_THEME = """() => {
  const dark = document.body.classList.toggle('dark');
  localStorage.setItem('charrnn-theme', dark ? 'dark' : 'light');
}"""
# A theme in the address goes before the one that was chosen last.
RESTORE_THEME = """() => {
  const chosen = localStorage.getItem('charrnn-theme');
  if (chosen && !new URLSearchParams(location.search).has('__theme')) {
    document.body.classList.toggle('dark', chosen === 'dark');
  }
}"""
# navigator.clipboard is missing where the page is served to others without TLS, and may be forbidden.
COPY = """async () => {
  const prompt = document.querySelector('#paper .prompt'), button = document.querySelector('#copy');
  const byHand = () => {
    const range = document.createRange();
    range.setStartBefore(prompt);
    range.setEndAfter(prompt.nextSibling || prompt);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    return document.execCommand('copy');
  };
  let said = 'No text yet';
  if (prompt) {
    const text = prompt.textContent + (prompt.nextSibling ? prompt.nextSibling.textContent : '');
    const done = navigator.clipboard ? await navigator.clipboard.writeText(text).then(() => true, byHand) : byHand();
    said = done ? 'Copied' : 'Not copied';
  }
  button.textContent = said;
  setTimeout(() => { button.textContent = 'Copy'; }, 1500);
}"""
# A text that is stopped ends as one that failed does, for Gradio.
STARTING = "() => { window.charrnnStopped = false; }"
STOPPING = "() => { window.charrnnStopped = true; return document.querySelector('#figures .hint')?.innerText ?? ''; }"
FAILED = """() => window.charrnnStopped
  ? document.querySelector('#figures .hint')?.innerText ?? '' : null"""
# A button that can no longer be pressed lets go of the focus; the keyboard goes on with the other one.
FOCUS_STOP = "() => document.querySelector('#stop').focus({ preventScroll: true })"
FOCUS_WRITE = """() => {
  if ([document.body, document.querySelector('#stop')].includes(document.activeElement)) {
    document.querySelector('#go').focus({ preventScroll: true });
  }
}"""

_FONTS = ("Segoe UI", "Roboto", "Helvetica Neue", "Noto Sans", "Liberation Sans", "Arial", "sans-serif")
_MONO_FONTS = ("SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "Liberation Mono", "monospace")


def theme() -> Any:
    """A Gradio theme with fonts of the reader's system only."""
    from gradio.themes import Soft
    from gradio.themes.utils.fonts import Font

    soft = Soft(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        # Plain names would be looked for as files on the server.
        font=[Font(name) for name in _FONTS],
        font_mono=[Font(name) for name in _MONO_FONTS],
    )
    return soft.set(
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_padding="0",
        block_border_width="1px",
        block_border_width_dark="1px",
        block_radius="12px",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_shadow="none",
        input_shadow_dark="none",
        input_border_color="*neutral_200",
        body_background_fill="*neutral_50",
        # Gradio's own are too pale to read on white.
        block_info_text_color="*neutral_500",
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_300",
    )
