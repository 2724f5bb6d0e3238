"""The sheet that `unit features --pca` draws: each picture beside its features as colours, at several sizes."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, GREY = "#ffffff", "#1b1b1f", "#6b7078"
CELL, MARGIN, TITLE = 300, 16, 24  # px: the longer side of a picture on the sheet; around it; the line above it


def draw(pictures: Sequence[tuple[str, Image.Image, Sequence]], sizes: Sequence[int]) -> Image.Image:
    """A row for each picture: itself, then the first three principal components of its patches, one colour a patch.

    The components are fitted on all sizes of a picture together, so colours compare along a row and not between rows.

    Args:
        pictures: name, picture, and grids of features `(rows, cols, D)`, one for each of `sizes`.
        sizes: side in pixels of the square that has the picture's area.
    """
    from modeling_unit import principal_colours

    rows = []
    for name, picture, grids in pictures:
        factor = CELL / max(picture.size)
        shown = tuple(max(1, round(side * factor)) for side in picture.size)
        cells = [(name.rsplit("/", 1)[-1], picture.convert("RGB").resize(shown, Image.Resampling.LANCZOS))]
        for size, grid, colours in zip(sizes, grids, principal_colours(grids), strict=True):
            patches = Image.fromarray(colours.numpy()).resize(shown, Image.Resampling.NEAREST)
            cells.append((f"{size} px: {grid.shape[0]} x {grid.shape[1]} patches", patches))
        rows.append(cells)
    heights = [TITLE + cells[0][1].height + MARGIN for cells in rows]
    sheet = Image.new("RGB", (MARGIN + (1 + len(sizes)) * (CELL + MARGIN), MARGIN + sum(heights)), PAPER)
    pen, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(size=14), MARGIN
    for cells, height in zip(rows, heights, strict=True):
        for column, (title, picture) in enumerate(cells):
            x = MARGIN + column * (CELL + MARGIN)
            pen.text((x, y), title, fill=INK if column == 0 else GREY, font=font)
            sheet.paste(picture, (x, y + TITLE))
        y += height
    return sheet
