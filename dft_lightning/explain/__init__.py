"""`dft weightings`: what there is to weight tokens by, and what each does to them."""
