"""A web page that translates: drop a picture, choose a translator, drag the strength, watch the trajectory.

    python -m letit_dist.demo runs/cats2dogs runs/dogs2cats
    python -m letit_dist.demo runs/quickstart/apple2orange --picture apple.png --port 7860

Each argument is a run of launch/train_energy.py, a folder of translators, or an id on the Hub. The chain is walked once
for each picture; the strength then only decodes another point of it. Works on a CPU; needs the extra `demo`
(pip install 'letit_dist[demo]'). The page is served to this machine alone, unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import math
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from letit_dist.errors import UserError, reports_errors

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from letit_dist.energy.translate import Translator


@dataclass(frozen=True)
class Walk:
    """A picture's chain: every point of it, and how it is decoded."""

    translator: Translator
    source: torch.Tensor  # pixels uint8 (3, R, R)
    path: torch.Tensor  # (T+1, *L)
    noise: list[torch.Tensor] | None  # the decoder's, the same for every point

    def at(self, strength: float) -> Image.Image:
        """The picture at a fraction of the chain, as `Translator.transport` defines it."""
        from letit_dist.pictures import to_picture

        steps = len(self.path) - 1
        fraction, whole = math.modf(round(min(max(strength, 0.0), 1.0) * steps, 9))
        first = self.path[int(whole)]
        point = first if fraction == 0 else first.lerp(self.path[int(whole) + 1], fraction)
        return to_picture(self.translator.decode(point[None], noise=self.noise)[0])

    def frames(self) -> list[torch.Tensor]:
        """Every point decoded, as images (3, R, R)."""
        return [self.translator.decode(point[None], noise=self.noise)[0] for point in self.path]


def open_all(paths: list[str], autoencoder: str | None = None) -> dict[str, Translator]:
    """All translators of these runs and folders by the name under which the page offers them."""
    from letit_dist.energy.translate import open_translators

    found: dict[str, Translator] = {}
    for path in paths:
        for translator in open_translators(path, autoencoder):
            extra = translator.energy.extra
            name = plain = f"{extra.get('source') or 'any'} to {extra.get('target') or 'target'}"
            number = 1
            while name in found:
                number += 1
                name = f"{plain} ({number})"
            found[name] = translator
    return found


def walk(translator: Translator, picture: Image.Image) -> Walk:
    """Encode a picture (its centred square, resized) and walk the whole chain."""
    from letit_dist.data.transforms import picture_pixels, resize_crop, to_images

    pixels = resize_crop(picture_pixels(picture), translator.autoencoder.config.resolution)
    latents = translator.encode(to_images(pixels[None].to(translator.device)))
    result = translator.transport(latents, keep_path=True, noise=translator.noise(0, [0]))
    assert result.path is not None
    return Walk(translator, pixels, result.path[:, 0], translator.autoencoder.decoder_noise(0, [0]))


def trajectory(found: Walk, folder: Path) -> Path:
    """The whole chain as an animation in `folder`; returns its file."""
    from letit_dist.pictures import save_frames, to_picture, visible_size

    path = Path(tempfile.mkdtemp(dir=folder), "trajectory.gif")
    images = found.frames()
    side = visible_size(images[0].shape[-1], 256)
    save_frames((to_picture(image, side) for image in images), len(images), path, milliseconds=150)
    return path


def read_picture(path: Path) -> Image.Image:
    """A file's picture as every program sees it: upright, RGB, over white. UserError for what is none."""
    from letit_dist.data.transforms import UnreadableImage, decode
    from letit_dist.pictures import to_picture

    try:
        return to_picture(decode(path.read_bytes()))
    except OSError as error:
        raise UserError(f"--picture {path}: {error.strerror or error}") from None
    except UnreadableImage as error:
        raise UserError(f"--picture {path}: {error}") from None


def check_place(host: str, port: int) -> None:
    """Raise UserError unless a page can be served there: gradio would blame the port for everything."""
    if not 0 < port < 65536:
        raise UserError(f"--port {port}: a number from 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: no such address; 127.0.0.1 is this machine alone, 0.0.0.0 everybody") from None
    with socket.socket(family, kind, protocol) as trial:
        # As the server does: a page that was closed a moment ago is no hindrance.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"--host {host}: not an address of this machine; 0.0.0.0 are all of them") from None
            raise UserError(f"cannot serve at {host}:{port}: {error.strerror}; name another --port") from None


def build(translators: dict[str, Translator], folder: Path, picture: Image.Image | None = None) -> Any:
    """The page, as gradio's Blocks; animations are written to `folder`."""
    import gradio as gr

    from letit_dist.energy.translate import METHOD
    from letit_dist.pictures import to_picture, visible_size

    def show(found: Walk, strength: float) -> Image.Image:
        seen = found.at(strength)
        side = visible_size(seen.width, 256)
        return seen.resize((side, side), 0)  # nearest: small images keep their pixels

    def drop(
        image: Image.Image | None, name: str, strength: float
    ) -> tuple[Walk | None, Image.Image | None, Image.Image | None, str | None]:
        if image is None:
            return None, None, None, None
        try:
            found = walk(translators[name], image)
        except UserError as error:
            raise gr.Error(str(error)) from None
        seen = to_picture(found.source)
        side = visible_size(seen.width, 256)
        return found, seen.resize((side, side), 0), show(found, strength), str(trajectory(found, folder))

    def drag(found: Walk | None, strength: float) -> Image.Image | None:
        return None if found is None else show(found, strength)

    with gr.Blocks(title="letit_dist") as page:
        gr.Markdown("# Latent energy transport\nDrop a picture, choose a translator, drag the strength.")
        # A walk cannot be copied for each visitor before there is one: none at first.
        walked = gr.State(None)
        with gr.Row():
            given = gr.Image(value=picture, type="pil", label="picture", height=300)
            with gr.Column():
                chosen = gr.Dropdown(list(translators), value=next(iter(translators)), label="translator")
                strength = gr.Slider(0, 1, value=1, step=0.01, label="strength")
        with gr.Row():
            seen = gr.Image(label="what the autoencoder sees", height=300, interactive=False)
            translated = gr.Image(label=METHOD, height=300, interactive=False)
            moved = gr.Image(label="trajectory", height=300, interactive=False)
        outputs = [walked, seen, translated, moved]
        for event in (given.change, chosen.change, page.load):
            event(drop, [given, chosen, strength], outputs, api_name=False)
        strength.input(drag, [walked, strength], translated, show_progress="hidden", api_name=False)
    return page


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m letit_dist.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("translators", nargs="+", metavar="ENERGY", help="runs, folders of translators, or Hub ids")
    parser.add_argument("--autoencoder", help="its folder, run or id (default: the one that each of them names)")
    parser.add_argument("--picture", type=Path, help="a picture to begin with")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve (127.0.0.1; 0.0.0.0 = to everybody)")
    parser.add_argument("--port", type=int, default=7860, help="(7860)")
    return parser.parse_args(argv)


@reports_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the demo needs gradio: pip install 'letit_dist[demo]'")
    import torch

    picture = None if args.picture is None else read_picture(args.picture)
    check_place(args.host, args.port)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    translators = {name: one.to(device) for name, one in open_all(args.translators, args.autoencoder).items()}
    with tempfile.TemporaryDirectory(prefix="letit_dist-demo-") as scratch:
        page = build(translators, Path(scratch), picture)
        try:
            page.launch(server_name=args.host, server_port=args.port, allowed_paths=[scratch], quiet=True)
        except OSError as error:
            raise UserError(f"cannot serve at {args.host}:{args.port}: {error}; name another --port") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
