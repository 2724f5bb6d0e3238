"""What made pages are put together from, smallest first.

``fonts``         font files from packages, a folder or the system, and their metrics
``corpus``        words: prose, rare words, numbers and codes, balanced as they are drawn
``elements``      styles, lines, rules and pictures on a sheet; wrapping, drawing, boxes
``layouts``       what a page holds and where: paragraphs, tables, forms, receipts, ...
``degradations``  paper, ink, geometry, light, blur, noise, JPEG

`training.data.made_pages` draws whole pages with them, `training.data.made_chunks` short chunks.
"""
