"""The frame of every page that the programs write: one HTML file that carries all it shows and asks for nothing."""

from __future__ import annotations

from html import escape


def page(title: str, style: str, body: str, script: str = "") -> str:
    """HTML of `body` under its `title`, which is escaped here; the other parts are HTML, CSS and JavaScript.

    The policy lets the page show what it carries and nothing else, so that whoever gets the file can open it without a
    thought; scripts run only where the page has one of its own.
    """
    allowed = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        allowed += "; script-src 'unsafe-inline'"
        body += f"<script>\n{script.strip()}\n</script>\n"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{allowed}">
<title>{escape(title)}</title>
<style>
{style.strip()}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body.strip()}
</body>
</html>
"""
