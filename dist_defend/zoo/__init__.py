"""A zoo: a folder of models, each with its card, the YAML that made it, and what it scored, to be counted again."""
