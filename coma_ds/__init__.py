"""coma-ds: compress an image into a few tokens, then match with them."""
