"""Data to calibrate with and to judge by: text, token ids, images, or calls of the user's own."""

from attnopt.data.calls import batches_of as batches_of
from attnopt.data.reading import held_out_of as held_out_of
from attnopt.data.reading import presented as presented
from attnopt.data.reading import split_for as split_for
from attnopt.data.sources import STDLIB as STDLIB
from attnopt.data.sources import Source as Source
from attnopt.data.sources import checked as checked
from attnopt.data.splitting import Split as Split
from attnopt.data.splitting import cut as cut
from attnopt.data.splitting import readable as readable
from attnopt.data.splitting import split_of as split_of
