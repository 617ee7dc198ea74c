// The shares of dz that the threads compute.
#pragma once

#include "product.h"

namespace {

// Partitions dz among the threads, by tile rows (kTileRows rows) and blocks of columns. Minimises the time of the
// largest part: its products, and reading dl of its rows and E of its columns.
struct RowsPartition {
  static constexpr Index kTileRowsOfBlock = kBlock / kTileRows;
  static constexpr Index kReading = 8;  // columns whose products take as long as reading a row, and vice versa

  RowsPartition(Index n_blocks, Index column_blocks, int n_threads)
      : n_tile_rows(n_blocks * kTileRowsOfBlock), column_blocks(column_blocks) {
    Index least = 0;
    for (Index columns = 1; columns <= smaller(column_blocks, n_threads); ++columns) {
      const Index rows = smaller(n_tile_rows, n_threads / columns);
      const Index time =
          (ceil_div(n_tile_rows, rows) * kTileRows + kReading) * (ceil_div(column_blocks, columns) * kBlock + kReading);
      if (columns == 1 || time < least) least = time, row_parts = rows, column_parts = columns;
    }
  }

  Index n_parts() const { return row_parts * column_parts; }
  Range tile_rows(Index part) const { return share(n_tile_rows, part / column_parts, row_parts); }
  Range columns(Index part, Index n_features) const {
    const Range blocks = share(column_blocks, part % column_parts, column_parts);
    return {blocks.begin * kBlock, smaller(blocks.end * kBlock, n_features)};
  }

  Index n_tile_rows, column_blocks;
  Index row_parts = 0, column_parts = 0;
};

}  // namespace
