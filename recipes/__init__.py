"""Complete configurations: run them with ``--config-name``, or copy them and edit."""
