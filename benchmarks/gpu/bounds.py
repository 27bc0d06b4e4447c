"""A bound that several parts share."""

#: Relative L2 distance of two gradients of small models in float32 whose sums are in another order: behind an entry
#: stand some 10⁴ roundings of u = 6e-8 with signs of their own, which add up to √10⁴·u = 6e-6 of it (as in
#: tests/exactness.py).
GRADIENT = 1e-5
