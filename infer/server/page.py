"""The page at /: what this server is, and a line to try it with."""

from html import escape

_PAGE = """<!doctype html>
<html lang="en">
<title>charrnn</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem; }}
pre {{ background: #8882; padding: 1rem; overflow-x: auto; }}
:root {{ color-scheme: light dark; }}
</style>
<h1>charrnn</h1>
<p>Character-level language models behind an API that clients of OpenAI's completions speak; a token is a character
(or a byte). Here: {models}.</p>
<pre>{curl}</pre>
<p><a href="v1/models">/v1/models</a> · <a href="health">/health</a> · <a href="metrics">/metrics</a></p>
</html>
"""


def page(models: list[str], url: str, with_key: bool) -> str:
    """The page as HTML. url: of this server, with a slash at the end. with_key: whether requests need an API key."""
    key = " -H 'Authorization: Bearer KEY'" if with_key else ""
    curl = (
        f"curl {url}v1/completions -H 'Content-Type: application/json'{key} \\\n"
        '  -d \'{"prompt": "The ", "max_tokens": 200, "temperature": 0.8, "stream": true}\''
    )
    return _PAGE.format(models=", ".join(f"<code>{escape(name)}</code>" for name in models), curl=escape(curl))
