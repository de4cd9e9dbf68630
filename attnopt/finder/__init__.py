"""Find every attention in a program by what it computes, and say what each one is."""

from attnopt.finder.finding import Explanation, Findings, explain, find_sites

__all__ = ["Explanation", "Findings", "explain", "find_sites"]
