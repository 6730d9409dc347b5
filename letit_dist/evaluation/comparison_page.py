"""A page that wipes between a source image and its translations: one file, no network, nothing to install."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from string import Template

from torch import Tensor

from letit_dist.data.transforms import encode
from letit_dist.energy.translate import METHOD
from letit_dist.evaluation.web_page import page

_STYLE = Template("""
:root { color-scheme: light dark; font: 1.05rem/1.5 system-ui, sans-serif; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; }
h1 { font-size: 1.3rem; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
main { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, $column), 1fr)); }
.wipe { position: relative; aspect-ratio: 1; overflow: hidden; --cut: 50%; }
.wipe img { position: absolute; inset: 0; width: 100%; height: 100%; $pixelated}
.wipe img.over { clip-path: inset(0 0 0 var(--cut)); }
.wipe img[hidden] { display: none; }
.wipe::after { content: ""; position: absolute; inset: 0 auto 0 var(--cut); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 0 1px #000; pointer-events: none; }
.ends { display: flex; justify-content: space-between; gap: 1rem; }
label { display: block; }
input[type=range] { width: 100%; margin: 0; height: 2.75rem; accent-color: #0072b2; }
select { font: inherit; min-height: 2.75rem; max-width: 100%; }
:focus-visible { outline: 3px solid #e69f00; outline-offset: 2px; }
""")

_BODY = Template("""
<p>Each picture shows the source on the left of the line and the chosen method on the right. Move the line with the
slider: by touch, by mouse, or with the arrow keys.</p>
<noscript><p>Without scripts the line stays in the middle.</p></noscript>
<main>
$figures</main>
""")

_SCRIPT = """
for (const section of document.querySelectorAll("section")) {
  const slider = section.querySelector("input"), choice = section.querySelector("select");
  const wipe = section.querySelector(".wipe"), right = section.querySelector(".right");
  const show = () => {
    for (const image of section.querySelectorAll("img.over")) image.hidden = image.dataset.method !== choice.value;
    wipe.style.setProperty("--cut", slider.value + "%");
    right.textContent = choice.value;
    slider.setAttribute("aria-valuetext",
      slider.value + " % source, " + (100 - slider.value) + " % " + choice.value);
  };
  slider.addEventListener("input", show);
  choice.addEventListener("input", show);
  show();
}
"""

_FIGURE = Template("""<section aria-labelledby="name-$number">
<h2 id="name-$number">$name</h2>
<div class="wipe">
$images</div>
<div class="ends" aria-hidden="true"><span>$source</span><span class="right">$chosen</span></div>
<label for="slider-$number">Line between $source and method</label>
<input id="slider-$number" type="range" min="0" max="100" value="50" autocomplete="off">
<label for="method-$number">Method on the right</label>
<select id="method-$number" autocomplete="off">$options</select>
</section>
""")


def comparison_page(
    title: str, names: Sequence[str], rows: Mapping[str, Sequence[Tensor]], chosen: str = METHOD
) -> str:
    """HTML with every image of `rows`, pixels (3, H, W), as a lossless PNG in it; the first row is the source, and
    `chosen` the method that each picture begins with."""
    source, *methods = rows
    side = rows[source][0].shape[-1]
    figures = []
    for number, name in enumerate(names):
        images = [_image(rows[source][number], source, name, "under")]
        images += [_image(rows[m][number], m, name, "over", hidden=m != chosen) for m in methods]
        options = [
            f'<option value="{escape(m)}"{" selected" if m == chosen else ""}>{escape(m)}</option>' for m in methods
        ]
        figures.append(
            _FIGURE.substitute(
                number=number,
                name=escape(name),
                images="".join(images),
                source=escape(source),
                chosen=escape(chosen),
                options="".join(options),
            )
        )
    style = _STYLE.substitute(
        # Small pictures are enlarged with their pixels in sight, as in the sheet.
        pixelated="image-rendering: pixelated; " if side < 256 else "",
        column=f"{min(max(side, 320), 1024)}px",
    )
    return page(title, style, _BODY.substitute(figures="".join(figures)), _SCRIPT)


def _image(pixels: Tensor, method: str, name: str, kind: str, *, hidden: bool = False) -> str:
    data = base64.b64encode(encode(pixels)).decode()
    return (
        f'<img class="{kind}" data-method="{escape(method)}" alt="{escape(f"{name}, {method}")}"'
        f'{" hidden" if hidden else ""} src="data:image/png;base64,{data}">\n'
    )
