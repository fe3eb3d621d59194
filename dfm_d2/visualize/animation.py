"""An animated GIF of boxes on their way from noise to the answer. Shapes: N proposals, K solver steps."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dfm_d2.data.files import write_atomically
from dfm_d2.visualize.figures import predictor_color
from dfm_d2.visualize.record import FlowRecord

# Shortest side of a frame in pixels, so that small images stay readable.
_SIDE = 384
_BETWEEN, _FRAME_MS, _HOLD_MS = 6, 70, 1600
_BAR = 26


def write_gif(path: str | Path, record: FlowRecord, image: np.ndarray, score_thresh: float = 0.3) -> Path:
    """Boxes in the colour of the predictor that moves them, as opaque as it is sure; grey below
    `score_thresh`. Between two times they go straight, as the Euler solver does.

    Args:
        image: uint8 RGB `(H, W, 3)` of the original size.

    Returns:
        The path written.
    """
    frames, durations = zip(*_frames(record, image, score_thresh))
    options = {"append_images": frames[1:], "duration": list(durations), "loop": 0, "optimize": True}
    content = BytesIO()
    frames[0].save(content, "GIF", save_all=True, **options)
    write_atomically(path, lambda file: file.write(content.getvalue()))
    return Path(path)


def _frames(record: FlowRecord, image: np.ndarray, score_thresh: float) -> Iterator[tuple[Image.Image, int]]:
    scale = max(1, -(-_SIDE // min(image.shape[:2])))
    base = Image.fromarray(image)
    base = base.resize((base.width * scale, base.height * scale), Image.Resampling.BICUBIC).convert("RGBA")
    for k in range(len(record.answers)):
        for share in np.arange(_BETWEEN) / _BETWEEN:
            boxes = record.states[k].lerp(record.states[k + 1], float(share))
            t = record.times[k] + float(share) * (record.times[k + 1] - record.times[k])
            yield _frame(base, record, k, boxes.numpy() * scale, t, score_thresh), _FRAME_MS
    boxes = record.states[-1].numpy() * scale
    yield _frame(base, record, k, boxes, record.times[-1], score_thresh), _HOLD_MS


def _frame(
    base: Image.Image, record: FlowRecord, k: int, boxes: np.ndarray, t: float, score_thresh: float
) -> Image.Image:
    layer = Image.new("RGBA", base.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    scores, leaders = record.scores[k], record.leader(k)
    for n in scores.argsort().tolist():
        sure = float(scores[n]) >= score_thresh
        color = predictor_color(int(leaders[n])) if sure else (0.75, 0.75, 0.75)
        alpha = int(255 * (max(float(scores[n]), 0.75) if sure else 0.35))
        x0, y0, x1, y1 = boxes[n]
        corners = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        draw.rectangle(corners, outline=(*(int(255 * c) for c in color), alpha), width=3 if sure else 1)
    frame = Image.new("RGB", (base.width, base.height + _BAR), "white")
    frame.paste(Image.alpha_composite(base, layer).convert("RGB"), (0, _BAR))
    names = ", ".join(f"p{answer.predictor}" for answer in record.answers[k])
    text = f"t = {t:.3f}   step {k + 1} of {len(record.answers)}   {names}"
    write = ImageDraw.Draw(frame)
    write.text((6, 5), text, fill="black", font=ImageFont.load_default(15))
    write.rectangle((0, _BAR - 3, frame.width * t, _BAR - 1), fill=(60, 110, 200))
    # Without dithering, whose noise would be most of the file.
    return frame.quantize(128, dither=Image.Dither.NONE)
