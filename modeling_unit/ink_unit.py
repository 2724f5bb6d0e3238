"""The ink of a page: paper made white, letters made dark, connected pieces found, rules and pictures told from
letters.

Used by `layout_unit`; numpy and PIL only. `u` in comments is the height of a lower-case x in pixels. The numbers are
ours.
"""

import math

import numpy as np
from PIL import Image


def normalise_page(gray):
    """Paper white, ink dark: `(page of mode L, mask of ink (H, W) or None if the page is blank)`."""
    histogram = np.array(gray.histogram(), np.int64)
    levels = np.flatnonzero(histogram)
    if levels[-1] - levels[0] < 24:  # one even tone
        return Image.new("L", gray.size, 255), None
    if _is_light_on_dark(gray):
        gray = gray.point([255 - v for v in range(256)])
    paper = _paper(gray)
    if isinstance(paper, int):
        page = gray.point([min(255, round(255 * v / max(paper, 1))) for v in range(256)])
    else:
        ratio = np.asarray(gray, np.float32) * 255.0
        ratio /= np.maximum(paper, 1.0)
        np.minimum(ratio, 255.0, out=ratio)
        page = Image.fromarray(ratio.astype(np.uint8))
    page = _darkened(page)
    mask = ink_mask(page)
    return page, mask if mask is not None and mask.any() else None


def _darkened(page):
    """Faint ink made dark: white stays, the ink's own level goes to 40, unless it is dark already or there is none."""
    histogram = np.array(page.histogram(), np.int64)
    ink = np.cumsum(histogram[: _otsu(histogram) + 1])
    level = int(np.searchsorted(ink, 0.25 * ink[-1]))
    if not 90 < level < 255 - 40:
        return page
    return page.point([max(0, round(255 - (255 - v) * (255 - 40) / (255 - level))) for v in range(256)])


def ink_mask(page):
    """Mask of the ink of a page whose paper is white, `None` if there is nothing dark enough to be ink."""
    histogram = np.array(page.histogram(), np.int64)
    darkest = int(np.searchsorted(np.cumsum(histogram), max(1, 2e-5 * histogram.sum())))
    if darkest > 255 - 40:  # noise of scanners and of JPEG stays within some 30 levels
        return None
    # Grey code listings and thin blurred strokes are as good as black ink, so the level lies near the paper: six
    # times the paper's own unevenness (grain of a scan, ringing of JPEG) away from it, but at least as near as Otsu's
    # level.
    levels = np.arange(256)
    paper = histogram * (levels > 200)
    spread = math.sqrt(float((paper * (255 - levels) ** 2).sum() / max(1, paper.sum())))
    otsu = _otsu(histogram)
    threshold = min(208.0, max(225 - 6 * spread, (otsu + 195) / 2, otsu))
    return np.asarray(page) < threshold


def _otsu(histogram):
    """The level that parts a histogram of 256 bins into the two classes of least variance; it is of the dark one."""
    share = histogram / histogram.sum()
    weight, mean = np.cumsum(share), np.cumsum(share * np.arange(256))
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean[-1] * weight - mean) ** 2 / (weight * (1.0 - weight))
    return int(np.argmax(np.nan_to_num(between, nan=0.0, posinf=0.0)))


def _is_light_on_dark(gray):
    """Whether strokes are lighter than what is around them.

    Ink covers less than half of any stretch of text, so the third moment of its grey levels about their mean has the
    sign of the ink. Summed over blocks of some 32 pixels, neither shadows nor empty margins matter.
    """
    step = max(1, math.isqrt(gray.width * gray.height // 500_000))
    pixels = np.asarray(gray)[::step, ::step].astype(np.float32)  # every step-th pixel has the same distribution
    block = max(4, 32 // step)
    height, width = (max(1, v // block) for v in pixels.shape)
    high, wide = min(block, pixels.shape[0]), min(block, pixels.shape[1])
    blocks = pixels[: height * high, : width * wide].reshape(height, high, width, wide)
    blocks = blocks - blocks.mean(axis=(1, 3), keepdims=True)
    return float((blocks**3).sum()) > 0


def _paper(gray):
    """Brightness of the paper under the ink: an `int` if it is the same all over, else `(H, W)` float32."""
    cell = 4  # white between two lines spans a whole cell wherever letters are of legible size
    small = np.asarray(gray.reduce(cell) if min(gray.size) >= cell else gray)
    middle, bright = np.percentile(small, (50, 99))
    if bright - middle < 6:  # at least half of the page is white to the same degree: a rendered page, as a rule
        counts = np.bincount(small.ravel(), minlength=256)
        return int(max(0, middle - 2) + np.argmax(counts[max(0, int(middle) - 2) :]))
    # Grey closing: the maximum fills strokes narrower than the window, the minimum restores the edges of larger
    # shapes.
    window = max(8, min(32, min(small.shape) // 4))
    closed = 255 - _running_max(255 - _running_max(small, window), window)
    paper = Image.fromarray(closed).resize(gray.size, Image.Resampling.BILINEAR)
    return np.asarray(paper, np.float32)


def _running_max(values, window):
    """Maximum over a centred square of about `window` cells; `(h, w)` uint8 to the same."""
    for axis in (0, 1):
        done, left = 1, 0
        while done < window:
            step = min(done, window - done)
            shifted = values.copy()
            if axis == 0:
                np.maximum(values[:-step], values[step:], out=shifted[:-step])
            else:
                np.maximum(values[:, :-step], values[:, step:], out=shifted[:, :-step])
            values, done, left = shifted, done + step, left + step
        # each value now covers [i, i + window): put it in the middle, repeating the border
        values = np.concatenate([np.repeat(values.take([0], axis), window // 2, axis), values], axis)
        values = values[: -(window // 2)] if axis == 0 else values[:, : -(window // 2)]
    return values


class Ink:
    """Connected pieces of ink (8 neighbours), found on horizontal runs instead of pixels: that makes it quick in
    numpy.

    `row, start, stop, label`: one entry per run, sorted by row. `x0, y0, x1, y1, area`: one entry per piece.
    """

    def __init__(self, mask):
        self.shape = mask.shape
        self.row, self.start, self.stop = runs_of_mask(mask)
        self.label = _connect(self.row, self.start, self.stop, mask.shape[1])
        self._measure()

    def _measure(self):
        count = int(self.label.max()) + 1 if len(self.label) else 0
        order = np.argsort(self.label, kind="stable")
        first = np.searchsorted(self.label[order], np.arange(count))
        self._order, self._first = order, np.append(first, len(order))
        if count == 0:
            self.x0 = self.y0 = self.x1 = self.y1 = self.area = np.zeros(0, np.int64)
            return
        self.x0 = np.minimum.reduceat(self.start[order], first)
        self.x1 = np.maximum.reduceat(self.stop[order], first)
        self.y0 = self.row[order][first]  # runs are sorted by row, and the sort by label is stable
        self.y1 = self.row[order][self._first[1:] - 1] + 1
        self.area = np.add.reduceat((self.stop - self.start)[order], first)

    @property
    def width(self):
        return self.x1 - self.x0

    @property
    def height(self):
        return self.y1 - self.y0

    def runs_of(self, piece):
        return self._order[self._first[piece] : self._first[piece + 1]]

    def typical_height(self):
        """The commonest height of pieces shaped like letters, the first guess at the x-height; 0 if there are none."""
        w, h = self.width, self.height
        letters = (h >= 3) & (w <= 6 * h) & (h <= 8 * w) & (h < 0.9 * self.shape[0] + 8) & (w >= 2)
        letters &= self.area > 0.1 * w * h  # not a frame
        heights = h[letters]
        if not len(heights):
            return 0.0
        counts = np.bincount(heights, minlength=8).astype(np.float64)
        smooth = np.convolve(counts, [0.5, 1.0, 0.5], "same")
        # What is three pixels tall may be dirt as well as letters; larger pieces nearly as common are the text.
        smooth *= np.minimum(np.arange(len(smooth)) / 5.0, 1.0)
        return float(np.argmax(smooth))

    def glyphs(self, unit):
        """Indices of pieces that may be letters; what is joined to rules and frames is freed from them first."""
        w, h = self.width, self.height
        rule = ((h < 0.5 * unit) & (w > 5 * unit)) | ((w < 0.5 * unit) & (h > 6 * unit))
        large = ((h > 5 * unit) | ((w > 20 * unit) & (h > 0.5 * unit))) & ~rule
        keep = ~rule & ~large
        added = []
        for piece in np.flatnonzero(large):
            density = self.area[piece] / (w[piece] * h[piece])
            if h[piece] <= 14 * unit and 0.1 * h[piece] <= w[piece] <= 2 * h[piece] and 0.12 < density < 0.8:
                keep[piece] = True  # the letter of a title, perhaps; `_measured` asks for company
            elif density > 0.5 and min(w[piece], h[piece]) > 1.5 * unit:
                added += self._letters_in_panel(piece, unit)
            elif min(w[piece], h[piece]) > 1.2 * unit:
                added += self._letters_on_rules(piece, unit)
        if not added:
            return np.flatnonzero(keep)
        before = len(self.x0)
        self._append(added)
        return np.concatenate([np.flatnonzero(keep), np.arange(before, len(self.x0))])

    def _append(self, pieces):
        """Adds pieces given as `(row, start, stop)` and sorts all runs by row again."""
        rows = [self.row] + [p[0] for p in pieces]
        starts = [self.start] + [p[1] for p in pieces]
        stops = [self.stop] + [p[2] for p in pieces]
        count = len(self.x0)
        labels = [self.label] + [np.full(len(p[0]), count + i) for i, p in enumerate(pieces)]
        row = np.concatenate(rows)
        order = np.argsort(row, kind="stable")
        self.row, self.start = row[order], np.concatenate(starts)[order]
        self.stop, self.label = np.concatenate(stops)[order], np.concatenate(labels)[order]
        self._measure()

    def _painted(self, piece):
        runs = self.runs_of(piece)
        x0, y0 = self.x0[piece], self.y0[piece]
        shape = (self.y1[piece] - y0, self.x1[piece] - x0)
        return paint(shape, self.row[runs] - y0, self.start[runs] - x0, self.stop[runs] - x0)

    def _letters_in_panel(self, piece, unit):
        """White letters on a dark panel: the holes of a piece that are shaped like letters."""
        return self._letters(~self._painted(piece), piece, unit, border=False)

    def _letters_on_rules(self, piece, unit):
        """Letters that touch a rule, frame or curve: what is left of a piece without its long straight runs."""
        mask = self._painted(piece)
        longest = max(3, round(3 * unit))
        for turned in (False, True):
            view = mask.T if turned else mask
            row, start, stop = runs_of_mask(view)
            long = stop - start > longest
            rules = paint(view.shape, row[long], start[long], stop[long])
            mask = (view & ~rules).T if turned else view & ~rules
        return self._letters(mask, piece, unit, border=True)

    def _letters(self, mask, piece, unit, border):
        if not mask.any():
            return []
        inner = Ink(np.ascontiguousarray(mask))
        w, h = inner.width, inner.height
        good = (h <= 4 * unit) & (w <= 12 * unit) & (h >= 0.3 * unit)
        if not border:
            good &= (inner.x0 > 0) & (inner.y0 > 0) & (inner.x1 < mask.shape[1]) & (inner.y1 < mask.shape[0])
        letters = good & (h > 0.7 * unit) & (w < 5 * unit)
        if letters.sum() < 3 or good.sum() > 4 * letters.sum() + 8:  # texture, not text
            return []
        x0, y0 = self.x0[piece], self.y0[piece]
        found = []
        for index in np.flatnonzero(good):
            runs = inner.runs_of(index)
            found.append((inner.row[runs] + y0, inner.start[runs] + x0, inner.stop[runs] + x0))
        return found

    def split(self, cuts):
        """Part pieces that touch two lines, given as `[(piece, row)]`; returns the indices of the lower pieces."""
        new = []
        for piece, y in cuts:
            runs = self.runs_of(piece)
            runs = runs[self.label[runs] == piece]  # a piece across three lines loses its lower parts one by one
            new.append(len(self.x0) + len(new))
            self.label[runs[self.row[runs] >= y]] = new[-1]
        if cuts:
            self._measure()
        return new

    def windows(self, box, glyphs):
        """Masks of shape (box height, box width): the ink of `glyphs`, and all other ink."""
        x0, y0, x1, y1 = box
        a, b = np.searchsorted(self.row, (y0, y1))
        start, stop = np.maximum(self.start[a:b], x0), np.minimum(self.stop[a:b], x1)
        inside = stop > start
        start, stop = start[inside] - x0, stop[inside] - x0
        row, mine = self.row[a:b][inside] - y0, np.isin(self.label[a:b][inside], glyphs)
        shape = (y1 - y0, x1 - x0)
        own = paint(shape, row[mine], start[mine], stop[mine])
        return own, paint(shape, row[~mine], start[~mine], stop[~mine]) & ~own


def runs_of_mask(mask):
    """Horizontal runs of a mask (H, W): `(row, start, stop)`, sorted by row and column, `stop` exclusive."""
    height, width = mask.shape
    flat = np.zeros((height, width + 1), np.bool_)  # a white column at the end keeps runs within their row
    flat[:, :width] = mask
    flat = flat.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat[0]:
        edges = np.concatenate([[0], edges])
    begin, end = edges[0::2], edges[1::2]
    row = begin // (width + 1)
    return row, begin - row * (width + 1), end - row * (width + 1)


def _connect(row, start, stop, width):
    """Label of the connected piece of each run, from 0; runs of neighbouring rows connect also at a corner."""
    count = len(row)
    if count == 0:
        return np.zeros(0, np.int64)
    key = width + 2
    # Runs of the row above that touch run i: from the first whose stop reaches start[i] to the last whose start is at
    # most stop[i].
    low = np.searchsorted(row * key + stop, (row - 1) * key + start, "left")
    high = np.searchsorted(row * key + start, (row - 1) * key + stop, "right")
    touching = high - low
    parent = np.where(touching > 0, low, np.arange(count))
    while True:  # follow the first neighbour above up to the top of the piece, doubling the stride
        above = parent[parent]
        if np.array_equal(above, parent):
            break
        parent = above
    many = np.flatnonzero(touching > 1)
    if len(many):  # a run that joins several pieces from above
        extra = touching[many] - 1
        child = np.repeat(many, extra)
        offset = np.arange(extra.sum()) - np.repeat(np.cumsum(extra) - extra, extra)
        a, b = parent[child], parent[low[child] + 1 + offset]
        roots, index = np.unique(np.concatenate([a, b]), return_inverse=True)
        a, b = index[: len(a)], index[len(a) :]
        group = np.arange(len(roots))
        while True:
            smallest = np.minimum(group[a], group[b])
            new = group.copy()
            np.minimum.at(new, group[a], smallest)
            np.minimum.at(new, group[b], smallest)
            new = new[new]
            if np.array_equal(new, group):
                break
            group = new
        target = np.arange(count)
        target[roots] = roots[group]
        parent = target[parent]
    is_root = np.zeros(count, np.bool_)
    is_root[parent] = True
    return (np.cumsum(is_root) - 1)[parent]


def paint(shape, row, start, stop):
    """The mask (H, W) of runs that do not overlap."""
    height, width = shape
    change = np.zeros(height * (width + 1) + 1, np.int8)
    change[row * (width + 1) + start] += 1  # starts are distinct, and so are stops: nothing is added twice
    change[row * (width + 1) + stop] -= 1
    return np.cumsum(change, dtype=np.int8)[:-1].reshape(height, width + 1)[:, :width].astype(np.bool_)


def dilate(mask, reach):
    grown = mask.copy()
    for _ in range(reach):
        wide = grown.copy()
        wide[:, 1:] |= grown[:, :-1]
        wide[:, :-1] |= grown[:, 1:]
        grown = wide.copy()
        grown[1:] |= wide[:-1]
        grown[:-1] |= wide[1:]
    return grown


def skew_of(ink, unit, width):
    """Degrees by which lines fall to the right, within 3; 0 where they drift by under a third of the x-height."""
    h = ink.height
    letters = (h > 0.6 * unit) & (h < 3 * unit) & (ink.width < 4 * unit)
    if letters.sum() < 12:
        return 0.0
    x = (ink.x0[letters] + ink.x1[letters]) / 2.0
    y = ink.y1[letters].astype(np.float64)
    if len(x) > 3000:
        x, y = x[:: len(x) // 3000 + 1], y[:: len(y) // 3000 + 1]

    def sharpness(degrees):
        # Feet of letters fall into few bins when the page is turned so that its lines lie level.
        level = (y - x * math.tan(math.radians(degrees))) / max(1.0, unit / 6)
        counts = np.bincount((level - level.min()).astype(np.int64)).astype(np.float64)
        return float((counts**2).sum() + (counts[1:] * counts[:-1]).sum())

    level = sharpness(0.0)
    best = max(np.arange(-3.0, 3.001, 0.1), key=sharpness)
    best = max(np.arange(best - 0.1, best + 0.101, 0.02), key=sharpness)
    drift = math.tan(math.radians(abs(best))) * (x.max() - x.min())
    return float(best) if drift > unit / 3 and sharpness(best) > 1.08 * level else 0.0
