"""The planner: what every pass could do at every site, what it costs, and the best of it.

Candidates come from the passes, their damage from real losses on calibration rows, one site at a
time; a knapsack chooses among them, and what it chose is measured whole, beside every pass used
alike everywhere. All scores are kept, so that another budget, or the same command after an
interruption, asks for none of them again.
"""

from attnopt.search.rules import Rule as Rule
from attnopt.search.searching import Found as Found
from attnopt.search.searching import search as search
