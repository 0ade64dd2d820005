"""What verl's entry-point group names. verl imports a plugin and calls nothing: importing this installs it."""

from tlt_verl.plugin import verl_plugin

verl_plugin()
