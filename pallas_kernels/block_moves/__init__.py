"""Survivors of an eviction into the holes that it left."""

from pallas_kernels.block_moves.api import Moves as Moves
from pallas_kernels.block_moves.api import move_kvs as move_kvs
