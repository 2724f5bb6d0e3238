"""Training data: made from packages by name or mapped from data sets of others, in one documented schema.

==================== ===========================================================================================
``schema``           the columns of a row, a validator, the parquet writer and reader
``refusals``         rows that are skipped: counted by source and reason, up to a share
``sources``          download and unpack Debian and npm packages into the cache
``text``             one normalisation of text, words, undoing line breaks
``languages``        languages and scripts of texts
``mapping``          anything that `datasets` reads, as rows of the schema
``validation``       what a data set holds, and what of it cannot be used
``contact_sheet``    sample rows drawn on a sheet
``pdf``              pages of TeX Live documentation -> chunks for training, blocks for validation
``pdf_sources``      PDFs of folders, archives and packages
``pdf_pages``        whole pages of any PDF in reading order: columns, footnotes, headers, tables
``line_cuts``        pages -> their lines as the `Reader` cuts them
``pdf_build``        sources -> a data set of pages, blocks, lines or chunks
``guarded``          work on strangers' files in processes that may hang or die
``lines``            data sets of lines: PDFs of packages, drawn pages, pictures without text
``made_chunks``      chunks of text drawn with skia, with random fonts and degradations
``made_pages``       whole pages drawn with skia, put together from ``pages``: fonts, words, layouts, degradations
``markdown``         the dialect of Markdown that pages are labelled in: reading any, writing only this
``markdown_typeset`` Markdown set in type with skia, pages with a box for each word
``markdown_pages``   Markdown files from npm packages and folders -> typeset pages
``markdown_latex``   PDFs with their LaTeX beside them -> their pages with Markdown
``pictures``         captioned pictures
``targets``          what the teachers of recognition say about them
``shrink``           a copy of a picture data set in fewer bytes
``blanks``           strips of pictures with nothing to read on them
``evaluation_sets``  held-out paragraphs and pages at several x-heights, to measure reading on
``evaluation_made``  dense and sparse made pages in held-out fonts and words, and blank sheets, to measure on
``scans``            scanned pages with their text, of a Debian source package
``labelled``         FUNSD, SROIE, CORD and other labelled scans as they are published
``augment``          seeded changes to training images
``mixture``          which rows make which micro-batch of a run
``generate``         made rows by the million, on datatrove's executors
``heldout``          what is never trained on, and the check that it was not
==================== ===========================================================================================
"""
