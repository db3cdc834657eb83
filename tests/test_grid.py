import torch
from hypothesis import given
from hypothesis import strategies as st

from arkv import Grid

grids = st.builds(Grid, rows=st.integers(1, 9), columns=st.integers(1, 9), newline=st.booleans())


@given(grids)
def test_positions_count_through_the_cells_in_raster_order(grid: Grid) -> None:
    cells = [(row, column) for row in range(grid.rows) for column in range(grid.columns + grid.newline)]
    assert [(grid.row(i), grid.column(i)) for i in range(grid.tokens)] == cells


@given(grids)
def test_tensors_of_positions_work_as_numbers_do(grid: Grid) -> None:
    positions = torch.arange(grid.tokens)
    assert grid.row(positions).tolist() == [grid.row(i) for i in range(grid.tokens)]
    assert grid.column(positions).tolist() == [grid.column(i) for i in range(grid.tokens)]


def test_a_newline_counts_as_a_visual_token() -> None:
    # Lumina-mGPT-768, arXiv 2408.02657: 48 x 48 codes and 48 newlines.
    lumina = Grid(48, 48, newline=True)
    assert (lumina.line, lumina.tokens) == (49, 2352)
    assert lumina.column(48) == lumina.columns
    assert Grid(24, 24).tokens == 576
