"""``python -m fused_adam``: what a bug report should contain."""

import platform

import numpy as np

from fused_adam import show_config


def main() -> None:
    config = show_config()
    config["numpy"] = np.__version__
    config["python"] = f"{platform.python_implementation()} {platform.python_version()}"
    config["platform"] = platform.platform()
    width = max(map(len, config))
    for name, value in config.items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:{width}}  {text}")


if __name__ == "__main__":
    main()
