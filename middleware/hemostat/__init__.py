"""The package of Hemostat's shell: the proxy, the shadow path, storage, metrics and the command line."""

__version__ = "0.3.0.dev0"
