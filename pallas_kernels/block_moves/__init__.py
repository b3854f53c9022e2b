"""Survivors of an eviction into the holes that it left."""

from pallas_kernels.block_moves.api import move_kvs as move_kvs
from pallas_kernels.block_moves.types import Moves as Moves
