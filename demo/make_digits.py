"""Write the demo's source of images: 1,797 real handwritten digits as 32 x 32 RGB files, in a folder for each class.

    python -m demo.make_digits --output-dir exps/demo/digits

makes `exps/demo/digits/7/0042.png` for the digit at position 42 of scikit-learn's list, which shows a 7.
"""

from __future__ import annotations

import dataclasses

from runtime import cli
from runtime.cli import flag


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    output_dir: str = flag(cli.REQUIRED, "folder for the class folders 0 to 9")


if __name__ == "__main__":
    cli.parse_early(DigitsConfig, __doc__)  # answers --help before scikit-learn is imported

import io
from pathlib import Path

from PIL import Image

from demo.digits import enlarge, load_digits
from runtime.files import write_atomically


def write_digits(directory: Path) -> int:
    """Write the images that are missing from `directory`; returns the number of images in all, 1,797."""
    digits, labels = load_digits()
    for label in range(10):
        (directory / str(label)).mkdir(parents=True, exist_ok=True)
    for index, (image, label) in enumerate(zip(enlarge(digits), labels, strict=True)):
        path = directory / str(label) / f"{index:04d}.png"
        if not path.exists():
            content = io.BytesIO()
            Image.fromarray(image).save(content, format="png")
            write_atomically(path, content.getvalue())
    return len(digits)


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(DigitsConfig, argv, __doc__)
    count = write_digits(Path(config.output_dir))
    print(f"{count:,} digits in {config.output_dir}")


if __name__ == "__main__":
    cli.run(main)
