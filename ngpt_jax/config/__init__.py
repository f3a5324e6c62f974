"""The fields of a run, experiment files and overrides, checks and derived values."""

from ngpt_jax.config.convert import default_config, differences, to_config_dict, to_json
from ngpt_jax.config.fields import CheckpointConfig, Config, DataConfig, ModelConfig, SourceConfig
from ngpt_jax.config.resolve import check_source, from_config_dict, from_saved
from ngpt_jax.errors import ConfigError
