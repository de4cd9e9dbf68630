"""Let each token of an image see its neighbourhood only, and the tokens before the image.

A window of the whole grid is dense attention, and the site is left as it is. With a stride, groups
of tokens share a window, so that fewer tiles are visited (`attnopt.visits` finds which); with a
tile, tokens run through the model in the order of tiles (`attnopt.hoisting`). Diffusion
transformers often take it without training; classifiers want to be healed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from attnopt.finder.ops import value
from attnopt.hoisting import lay_out
from attnopt.neighborhoods import BORDERS, Border, Neighborhood
from attnopt.nouns import Mlp, No, Site
from attnopt.ops import neighborhood_attention
from attnopt.surgery import GraphEdit
from attnopt.visits import search

exact = False
tier = 2
weightless = True

# A GPU's tile has 128 tokens; a smaller grid is cut into 16 tiles or so.
_TILE, _TILES = 128, 16
_SHARES = (0.75, 0.5, 0.25)
_SMALLEST = 3


@dataclass(frozen=True)
class Config:
    """How many keys a token sees along height and width; one number stands for both.

    `window` None is the whole grid. `border` says what a window does there: "shift" moves it
    inwards, "clamp" cuts it. `tile` is the order of tokens, None that of rows.
    """

    window: int | Sequence[int] | None = None
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1
    border: Border = "shift"
    tile: int | Sequence[int] | None = None


def fits(site: Site, config: Config) -> Literal[True] | No:
    """Say whether the tokens of a site can be made to see less."""
    for refuse in (_unplaced, _hiding, _impossible):
        refusal = refuse(site, config)
        if refusal is not None:
            return refusal
    return True


def candidates(site: Site) -> tuple[Config, ...]:
    """List the windows worth trying, the widest first, with the stride and tile found for each."""
    if site.grid is None:
        return (Config(),)
    found: list[Config] = []
    for share in _SHARES:
        grid = (site.grid.height, site.grid.width)
        window = tuple(min(n, max(_SMALLEST, round(n * share))) for n in grid)
        best = search(grid, window, area=_area(grid))
        if best and window != grid:
            found.append(Config(window, best[0].stride, tile=best[0].tile))
    return tuple(dict.fromkeys(found)) or (Config(),)


def proposals(site: Site | Mlp, asked: Any) -> tuple[Config, ...]:
    """List the windows of `candidates` where operations or time are to be saved."""
    if isinstance(site, Mlp) or not {"flops", "latency"} & set(asked.goals):
        return ()
    return candidates(site)


def convert(site: Site, stats: Any, config: Config) -> dict[str, Tensor]:
    """Return no new parameters: the weights stay as they are."""
    return {}


def emit(edit: GraphEdit, site: Site, config: Config) -> No | None:
    """Put the op at a site, its tokens in the order of tiles where there is one."""
    hood = neighborhood_of(site, config)
    if hood.is_dense:
        return None
    match = edit.match_of(site)
    if isinstance(match, No):
        return match
    node = edit.mapping[match.anchor]
    counts = [value(x.node).shape[2] for x in (match.q, match.k)]
    if any(not isinstance(n, int) for n in counts):
        return No("its number of tokens varies from call to call; a grid has one size", site.name)
    if counts != [hood.tokens, hood.tokens]:
        why = f"it has {counts[0]} queries and {counts[1]} keys where its grid has {hood.tokens}"
        return No(why, site.name)
    node.target = neighborhood_attention
    node.kwargs = {**_settings(hood, config), **node.kwargs}
    if config.tile is not None:
        lay_out(node, _pair(config.tile))
    return None


def cost(site: Site, config: Config, workload: Any) -> dict[str, float]:
    """Return the operations of attention for one image; no cache is kept."""
    hood = neighborhood_of(site, config)
    pairs = hood.share * hood.tokens**2
    flops = 2 * site.heads * (site.head_dim + site.v_head_dim) * pairs
    return {"flops": flops, "kv_elements_per_token": 0.0}


def tier_of(site: Site, config: Config) -> int:
    """Return the tier of a result: that of the source where nothing changes."""
    return 0 if neighborhood_of(site, config).is_dense else tier


def neighborhood_of(site: Site, config: Config) -> Neighborhood:
    """Return what the tokens of a site would see; a ValueError says what cannot be."""
    assert site.grid is not None
    grid = (site.grid.height, site.grid.width)
    window = grid if config.window is None else _pair(config.window)
    return Neighborhood.of(
        grid, window, _pair(config.stride), _pair(config.dilation), (False, False),
        config.border, site.grid.leading,
    )  # fmt: skip


def _settings(hood: Neighborhood, config: Config) -> dict[str, Any]:
    """Return the options of the op."""
    return {
        "grid": list(hood.grid),
        "window": [axis.window for axis in hood.axes],
        "stride": [axis.stride for axis in hood.axes],
        "dilation": [axis.dilation for axis in hood.axes],
        "causal": [axis.causal for axis in hood.axes],
        "border": config.border,
        "leading": hood.leading,
    }


def _pair(given: int | Sequence[int]) -> tuple[int, ...]:
    return (given, given) if isinstance(given, int) else tuple(given)


def _area(grid: Sequence[int]) -> int:
    """Return how many tokens a tile has: a power of two."""
    cells = grid[0] * grid[1] // _TILES
    return max(1, min(_TILE, 1 << max(cells.bit_length() - 1, 0)))


def _unplaced(site: Site, config: Config) -> No | None:
    if site.grid is None:
        why = (
            "its tokens are not those of an image, row by row, as far as the graph says; windows "
            "of an image are such a case, and see their neighbourhood already"
        )
        return No(why, site.name)
    if site.kind == "cross":
        return No("its keys are other tokens than its queries", site.name)
    if site.cached:
        return No("its keys come from a cache, which has no grid", site.name)
    return None


def _hiding(site: Site, config: Config) -> No | None:
    if site.mask.kind != "none":
        return No(
            f"its mask is {site.mask}; a neighbourhood replaces none but an open one", site.name
        )
    if site.padded:
        return No("padding hides some of its tokens, so that no grid is whole", site.name)
    return None


def _impossible(site: Site, config: Config) -> No | None:
    """Say which setting the grid of a site has no room for."""
    if config.border not in BORDERS:
        return No(f"border {config.border!r}: it is {' or '.join(BORDERS)}", site.name)
    assert site.grid is not None
    grid = (site.grid.height, site.grid.width)
    window = grid if config.window is None else _pair(config.window)
    if any(w > n for w, n in zip(window, grid, strict=False)) and config.border == "shift":
        sides = (" x ".join(map(str, x)) for x in (window, grid))
        return No("a window of {} is larger than the grid of {}".format(*sides), site.name)
    try:
        hood = neighborhood_of(site, config)
    except ValueError as error:
        return No(str(error), site.name)
    return None if config.tile is None else _untiled(site, config, hood)


def _untiled(site: Site, config: Config, hood: Neighborhood) -> No | None:
    """Say why tokens cannot be in the order of tiles."""
    assert config.tile is not None
    tile = _pair(config.tile)
    if len(tile) != 2 or min(tile) < 1:
        return No(f"tile {list(tile)} must have a positive side for height and width", site.name)
    if any(axis.dilation > 1 for axis in hood.axes):
        return No("tiles of a dilated window hold no neighbours; leave the tile out", site.name)
    if site.bias != "none":
        return No(f"its {site.bias} bias is in the order of rows; leave the tile out", site.name)
    return None
