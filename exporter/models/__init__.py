"""GLU/GQA models in torch. Shape letters are those of exporter/config.py and are carried by the variable names."""
