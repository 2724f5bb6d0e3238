"""Limits of one request to the Space, all [ours]: what a shared machine of two cores does in some seconds."""

MAX_FILE_BYTES = 20_000_000
MAX_PIXELS = 40_000_000  # an A4 page at 600 dpi has 35 million
MAX_PDF_PAGES = 1000  # one is rendered at a time; the number only bounds what opening costs
MAX_LABELS, MAX_LABEL_LENGTH, MAX_LABELS_LENGTH = 40, 80, 2000  # labels; characters of one, of all together
MAX_NEW_TOKENS = 96  # of a caption
QUEUE = 60  # requests that wait; a further one is told to come again
FILES_LIVE, FILES_CHECKED = 900, 120  # seconds after which what was sent or made is deleted; between two looks
