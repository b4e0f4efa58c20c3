"""The page's Gradio theme, and its style sheet and script as one piece of HTML."""

from importlib.resources import files
from typing import Any

from gradio.themes import Soft
from gradio.themes.utils.fonts import Font

_FONTS = ("Segoe UI", "Roboto", "Helvetica Neue", "Noto Sans", "Liberation Sans", "Arial", "sans-serif")
_MONO_FONTS = ("SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "Liberation Mono", "monospace")


def head() -> str:
    """HTML for the page's head; Gradio rewrites what comes as its own `css`."""
    style, script = (files("infer.ui").joinpath(name).read_text("utf-8") for name in ("style.css", "page.js"))
    return f"<style>\n{style}</style>\n<script>\n{script}</script>"


def theme() -> Any:
    """A Gradio theme that uses only fonts of the reader's system."""
    soft = Soft(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        # Gradio would look for plain names as files on the server.
        font=[Font(name) for name in _FONTS],
        font_mono=[Font(name) for name in _MONO_FONTS],
    )
    light_and_dark = {
        "block_title_background_fill": "transparent",
        "block_title_text_color": "*body_text_color",
        "block_border_width": "1px",
        "input_border_width": "1px",
        "input_shadow": "none",
        "button_primary_background_fill": "*primary_600",
        "button_primary_background_fill_hover": "*primary_700",
    }
    return soft.set(
        **light_and_dark,
        **{f"{name}_dark": value for name, value in light_and_dark.items()},
        block_title_padding="0",
        block_radius="12px",
        input_border_color="*neutral_200",
        body_background_fill="*neutral_50",
        # Gradio's own are too pale to read on white.
        block_info_text_color="*neutral_500",
        body_text_color_subdued="*neutral_500",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_300",
    )
