"""Training data: made from packages by name, kept outside the repository, in one documented schema.

===================  ===========================================================================================
``sources``          download and unpack Debian and npm packages into the cache
``text``             one normalisation of text, words, undoing line breaks
``schema``             the columns of a row, a validator, the parquet writer and reader
``refusals``           rows that are skipped: counted by source and reason, up to a share
``pdf``              pages of TeX Live documentation -> chunks for training, blocks for validation
``made_pages``       chunks of text drawn with skia, with random fonts and degradations
``blanks``           strips of pictures with nothing to read on them
``heldout``          what is never trained on, and the check that it was not
===================  ===========================================================================================
"""
