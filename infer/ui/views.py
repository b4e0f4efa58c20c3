"""The page's HTML: plain functions from what was computed to markup. Everything that comes from outside is escaped."""

from html import escape

from charrnn.vocab import Vocab
from infer.engine import Engine
from infer.ui.compute import Distribution, Odds, Read, Written, symbol_names, visible

# Surprise in bits above which the colour grows no stronger.
MOST_LEVEL = 8
# What stands in the place of a text's figures until its turn comes.
WAITING = "waiting for its turn"


def problem(message: str) -> str:
    """A fault, in the words of its error."""
    return f'<p class="problem" role="alert">{escape(message)}</p>'


def hint(text: str) -> str:
    """A quiet line of explanation."""
    return f'<p class="hint">{escape(text)}</p>'


def about(engine: Engine) -> str:
    """One line on a model: its kind, its size, what it knows."""
    model = engine.config.get("model", {})
    layers, hidden, kind = (model.get(key, "?") for key in ("num_layers", "hidden_dim", "rnn"))
    knows = "all bytes" if engine.vocab.kind == "bytes" else f"{len(engine.vocab)} characters"
    return hint(f"{kind}, {layers} × {hidden}, knows {knows}")


def paper(prompt: str, text: str) -> str:
    """The prompt and what was written after it. No tag is left to close, so that more text is only appended."""
    return f"<span class='prompt'>{escape(prompt)}</span>{escape(text)}"


def stopped_waiting() -> str:
    """What is said of a text that was stopped before its turn came."""
    return hint("stopped before it was begun")


def busy() -> str:
    """What is said when a request was not answered: the queue was full, or its answer failed."""
    return problem("The page could not answer: too many requests are waiting. Try again in a moment.")


def figures(written: Written) -> str:
    """Characters, speed and seed, on one line."""
    parts = [f"{len(written.text):,} chars", f"{written.chars_per_s:,.0f} chars/s", f"seed {written.seed}"]
    return '<p class="figures">' + "".join(f"<span>{part}</span>" for part in parts) + "</p>"


def legend() -> str:
    """The colours of 0 to MOST_LEVEL bits."""
    swatches = (f'<i class="s{n}">{n}{"+" if n == MOST_LEVEL else ""}</i>' for n in range(MOST_LEVEL + 1))
    return f'<p class="legend"><span>bits of surprise</span>{"".join(swatches)}</p>'


def surprises(characters: list[Read], vocab: Vocab) -> str:
    """A text with every character on the colour of its surprise; its candidates are in `data-tip` for the script."""
    if not characters:
        empty = "Type or paste a text above: every character gets the colour of its surprise."
        return f'<p class="mean">No text yet.</p><div class="reading">{hint(empty)}</div>'
    total = sum(character.bits for character in characters)
    mean = f"<b>{total / len(characters):.3f} bits/char</b> over {len(characters):,} characters"
    if vocab.kind == "bytes":
        num_bytes = len("".join(character.char for character in characters).encode())
        mean += f" ({total / num_bytes:.3f} bits/byte)"
    start = symbol_names(vocab)[vocab.start_id]
    after = f"the first is predicted after {escape(start)}, as if that stood before the text"
    marks = "".join(_mark(character, first=i == 0) for i, character in enumerate(characters))
    return f'<p class="mean">{mean}; {after}.</p><div class="reading">{marks}</div>'


def _mark(character: Read, first: bool) -> str:
    name = visible(character.char)
    level = min(int(character.bits), MOST_LEVEL)
    lines = [f"{name}\t{character.bits:.2f} bits", *(f"{n}\t{percent(p)}" for n, p in character.candidates)]
    shown = f"<u>{name}</u>\n" if character.char == "\n" else escape(character.char)
    # One character can be reached with the tab key; from there the arrow keys lead on.
    tab = 0 if first else -1
    return f'<i class="s{level}" tabindex="{tab}" data-tip="{escape(chr(10).join(lines))}">{shown}</i>'


def bars(distribution: Distribution) -> str:
    """A pair of bars for each of the likeliest characters: before and after temperature, top-k and top-p."""
    rows = [*distribution.shown, distribution.others]
    longest = max(max(odds.before, odds.after) for odds in rows)
    before, after = distribution.entropy
    summary = (
        f"<b>{distribution.kept} of {distribution.num_symbols}</b> characters can be drawn; "
        f"entropy {before:.2f} → <b>{after:.2f} bits</b>"
    )
    kinds = {"before": "the model", "after": "drawn from"}
    keys = "".join(f'<span class="key"><i class="{kind}"></i>{text}</span>' for kind, text in kinds.items())
    lines = "".join(_row(odds, longest) for odds in rows)
    return f'<p class="mean">{summary}</p><p class="keys">{keys}</p><ol class="bars">{lines}</ol>'


def _row(odds: Odds, longest: float) -> str:
    widths = {"before": odds.before / longest, "after": odds.after / longest}
    pair = "".join(f'<i class="{name}" style="width:{100 * width:.2f}%"></i>' for name, width in widths.items())
    kind = "cut" if odds.after == 0 else "kept"
    return (
        f'<li class="{kind}"><b>{escape(odds.name)}</b><span class="pair">{pair}</span>'
        f"<span>{percent(odds.before)}</span><span>{percent(odds.after)}</span></li>"
    )


def percent(p: float) -> str:
    """A probability as percent, with one digit after the point; what is not 0 is not shown as 0."""
    if p == 0:
        return "–"
    return "<0.1%" if p < 0.0005 else f"{100 * p:.1f}%"
