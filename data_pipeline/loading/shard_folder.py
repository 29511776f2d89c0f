"""Opens a folder of shards for reading: its index, the order of its samples and, for a remote folder, its cache."""

from __future__ import annotations

from pathlib import Path

from ambient_core import paths, storage
from ambient_core.errors import UserError
from data_pipeline.format.index import read_index
from data_pipeline.loading.batch_order import BatchOrder
from data_pipeline.loading.cache import ShardCache, retrying
from data_pipeline.loading.config import DataConfig
from data_pipeline.loading.reader import ShardReader


class ShardFolder:
    """A folder of shards that is opened for reading. path: the folder or its URL. index: the index of its shards.
    order: the order of its samples.

    Raises UserError if it is not a folder of shards, or if the cache is too small for it. Raises WorkFailed if a remote
    folder cannot be read."""

    def __init__(self, config: DataConfig, batch_size: int, seed: int) -> None:
        local = storage.local_path(config.shards)
        self.path, self._verify = str(local or config.shards), config.verify
        self.index = retrying(lambda: read_index(self.path), config.retries if local is None else 0, self.path)
        counts, shape_of = [shard.samples for shard in self.index.shards], [shard.shape for shard in self.index.shards]
        self.order = BatchOrder(counts, shape_of, batch_size, seed, config.group)
        self._cache: ShardCache | None = None
        if local is None:
            self._check_cache(config)
            self._cache = ShardCache(config.shards, _cache_folder(config), int(config.cache_gb * 1e9), config.retries)

    def reader(self) -> ShardReader:
        """Returns a new reader; each process needs its own. It keeps two shuffle blocks open, the current and the next
        one."""
        return ShardReader(self.path, self.index, 2 * self.order.group, self._cache, self._verify)

    def _check_cache(self, config: DataConfig) -> None:
        """Raises UserError if two shuffle blocks, the current and the next one, do not fit into the cache."""
        largest = max(shard.bytes for shard in self.index.shards)
        needed = min(2 * self.order.group, len(self.index.shards)) * largest / 1e9
        if needed > config.cache_gb:
            raise UserError(
                f"data.cache_gb {config.cache_gb:g}: two shuffle blocks of {self.order.group} shards take {needed:.3g} "
                "GB: raise it, or lower data.group",
                field="data.cache_gb",
                code="invalid",
            )


def _cache_folder(config: DataConfig) -> Path:
    return Path(config.cache_dir) if config.cache_dir else paths.cache() / "shards"
