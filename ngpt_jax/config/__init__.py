"""The fields of a run, experiment files and overrides, checks and derived values."""

from ngpt_jax.config.convert import (
    default_config,
    did_you_mean,
    differences,
    field_named,
    fields,
    to_config_dict,
    to_json,
)
from ngpt_jax.config.fields import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    MixtureConfig,
    ModelConfig,
    OptimizerConfig,
    Scale,
    SourceConfig,
)
from ngpt_jax.config.resolve import check_source, from_config_dict, from_saved
from ngpt_jax.errors import ConfigError
