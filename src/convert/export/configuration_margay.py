"""Configuration of a model converted by Margay: its base family's configuration, and what was changed."""

from functools import cache

from transformers import CONFIG_MAPPING, PreTrainedConfig


class MargayConfig(PreTrainedConfig):
    """What `config.json` names. Reading it gives an instance of the base family's own configuration class under this
    name, so that defaults and checks are the family's; `linearization` says which layers have which mixer."""

    model_type = "margay"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return of_family(config_dict["linearization"]["base_model_type"]).from_dict(config_dict, **kwargs)


@cache
def of_family(base_model_type):
    """`MargayConfig` as a subclass of the configuration of a family."""
    body = {"model_type": MargayConfig.model_type, "_auto_class": "AutoConfig", "__module__": __name__}
    return type(MargayConfig.__name__, (CONFIG_MAPPING[base_model_type],), body)
