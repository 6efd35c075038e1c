"""A table of agents and classes, read from a file: who has how much of what."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from storage.files import open_regular, read_text


def read_matrix(file: str, num_agents: int, num_classes: int) -> np.ndarray:
    """(agents, classes) of a CSV or npy file: shares of a class's images (0 to 1, a column sums to 1 at most), or
    numbers of images (whole, where one is above 1). What is left of a class is nobody's.

    Raises ValueError, naming the file, for anything else, and OSError where it can't be read.
    """
    try:
        if Path(file).suffix == ".npy":
            with open_regular(Path(file)) as opened:
                matrix = np.load(opened, allow_pickle=False).astype(np.float64)
        else:
            lines = [line for line in read_text(Path(file)).splitlines() if line.strip()]
            matrix = np.array([[float(number) for number in line.split(",")] for line in lines])
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"--partition_file {file} is no table of numbers: {error}") from None
    return _checked(matrix, (num_agents, num_classes), f"--partition_file {file}")


def _checked(matrix: np.ndarray, shape: tuple[int, int], name: str) -> np.ndarray:
    if matrix.shape != shape:
        raise ValueError(f"{name} has the shape {' x '.join(map(str, matrix.shape))}: {shape[0]} agents (rows) x "
                         f"{shape[1]} classes (columns) are needed")
    for what, wrong in (("not finite", ~np.isfinite(matrix)), ("negative", matrix < 0)):
        for row, column in np.argwhere(wrong):
            raise ValueError(f"{name}: the number of agent {row} and class {column} is {what}: {matrix[row, column]}")
    if matrix.max() > 1:
        for row, column in np.argwhere((matrix != np.round(matrix)) | (matrix > 2**53)):
            raise ValueError(f"{name}: {matrix[row, column]} (agent {row}, class {column}) is no number of images, but "
                             "others are above 1: give only shares, or only whole numbers")
    else:
        for column in np.flatnonzero(matrix.sum(axis=0) > 1 + 1e-6):
            raise ValueError(f"{name}: the shares of class {column} sum to {matrix[:, column].sum():g}, more than 1")
    return matrix
