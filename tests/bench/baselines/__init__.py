"""Published methods, written from their papers, that the benchmarks compare with.

Each gives a Program of the same shapes as the pass beside it, so that both are measured alike.
"""
