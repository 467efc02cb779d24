"""The test codec: pictures that kill, starve or hang whoever decodes them, where the codec is installed."""

import io
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parent)}


def picture(how: str, *, mib: int = 0, colour: tuple[int, int, int] = (20, 200, 30)) -> bytes:
    """A valid PNG that makes the test codec ``die`` (SIGSEGV), ``eat`` `mib` MiB of memory, ``hang``, or ``hold`` all its threads."""
    info = PngInfo()
    info.add_text("test-codec", how)
    info.add_text("test-mib", str(mib))
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
