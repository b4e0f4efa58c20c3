"""The page's HTML: pure functions from results to markup. Every text from outside is escaped."""

from html import escape

from charrnn.vocab import Vocab
from infer.engine import Engine
from infer.ui.predictions import Bar, Character, Distribution, Generated, symbol_names, visible

# The colour of a surprisal of this many bits or more.
MAX_LEVEL = 8
WAITING = "waiting in the queue"


def problem(message: str) -> str:
    """An error message."""
    return f'<p class="problem" role="alert">{escape(message)}</p>'


def hint(text: str) -> str:
    """A quiet line of explanation."""
    return f'<p class="hint">{escape(text)}</p>'


def about(engine: Engine) -> str:
    """One line on a model: cell type, size, vocabulary."""
    model = engine.config.get("model", {})
    layers, hidden, cell = (model.get(key, "?") for key in ("num_layers", "hidden_dim", "rnn"))
    vocabulary = "all bytes" if engine.vocab.kind == "bytes" else f"{len(engine.vocab)} characters"
    return hint(f"{cell}, {layers} × {hidden}, vocabulary: {vocabulary}")


def paper(prompt: str, text: str) -> str:
    """The prompt and its continuation. It ends in plain text, so that a longer one only appends."""
    return f"<span class='prompt'>{escape(prompt)}</span>{escape(text)}"


def busy() -> str:
    """The line for a request that was not answered: the queue was full, or its answer was lost."""
    return problem("The page could not answer: too many requests are waiting. Try again in a moment.")


def metrics(generated: Generated) -> str:
    """Characters, speed and seed, on one line."""
    parts = [f"{len(generated.text):,} chars", f"{generated.chars_per_s:,.0f} chars/s", f"seed {generated.seed}"]
    return '<p class="metrics">' + "".join(f"<span>{part}</span>" for part in parts) + "</p>"


def legend() -> str:
    """The colours of 0 to MAX_LEVEL bits."""
    swatches = (f'<i class="s{n}">{n}{"+" if n == MAX_LEVEL else ""}</i>' for n in range(MAX_LEVEL + 1))
    return f'<p class="legend"><span>surprisal in bits</span>{"".join(swatches)}</p>'


def surprisal(characters: list[Character], vocab: Vocab) -> str:
    """A text coloured by surprisal; `data-tip` holds each character's candidates for page.js."""
    if not characters:
        empty = "Type or paste a text above to see the surprisal of every character."
        return f'<p class="summary">No text yet.</p><div class="reading">{hint(empty)}</div>'
    total = sum(character.bits for character in characters)
    mean = f"<b>{total / len(characters):.3f} bits/char</b> over {len(characters):,} characters"
    if vocab.kind == "bytes":
        num_bytes = len("".join(character.char for character in characters).encode())
        mean += f" ({total / num_bytes:.3f} bits/byte)"
    start = symbol_names(vocab)[vocab.start_id]
    after = f"the first one is predicted after {escape(start)}, as at the start of a text"
    marks = "".join(_mark(character, first=i == 0) for i, character in enumerate(characters))
    return f'<p class="summary">{mean}; {after}.</p><div class="reading">{marks}</div>'


def _mark(character: Character, first: bool) -> str:
    name = visible(character.char)
    level = min(int(character.bits), MAX_LEVEL)
    lines = [f"{name}\t{character.bits:.2f} bits", *(f"{n}\t{percent(p)}" for n, p in character.candidates)]
    shown = f"<u>{name}</u>\n" if character.char == "\n" else escape(character.char)
    # A roving tabindex: the tab key reaches the first character, the arrow keys the others.
    tab = 0 if first else -1
    tip = escape("\n".join(lines))
    return f'<i class="s{level}" tabindex="{tab}" data-tip="{tip}">{shown}</i>'


def bars(distribution: Distribution) -> str:
    """A pair of bars for each symbol: before and after temperature, top-k and top-p."""
    rows = [*distribution.bars, distribution.others]
    longest = max(max(bar.before, bar.after) for bar in rows)
    before, after = distribution.entropy
    summary = (
        f"<b>{distribution.kept} of {distribution.vocab_size}</b> characters can be sampled; "
        f"entropy {before:.2f} → <b>{after:.2f} bits</b>"
    )
    kinds = {"before": "the model", "after": "sampled from"}
    keys = "".join(f'<span class="key"><i class="{kind}"></i>{text}</span>' for kind, text in kinds.items())
    lines = "".join(_row(bar, longest) for bar in rows)
    return f'<p class="summary">{summary}</p><p class="keys">{keys}</p><ol class="bars">{lines}</ol>'


def _row(bar: Bar, longest: float) -> str:
    widths = {"before": bar.before / longest, "after": bar.after / longest}
    pair = "".join(f'<i class="{name}" style="width:{100 * width:.2f}%"></i>' for name, width in widths.items())
    return (
        f'<li class="{"kept" if bar.after else "cut"}"><b>{escape(bar.name)}</b><span class="pair">{pair}</span>'
        f"<span>{percent(bar.before)}</span><span>{percent(bar.after)}</span></li>"
    )


def percent(p: float) -> str:
    """A probability in percent, with one decimal; only 0 is shown as a dash."""
    if p == 0:
        return "–"
    return "<0.1%" if p < 0.0005 else f"{100 * p:.1f}%"
