"""What verl's entry-point group loads: verl imports a plugin and calls nothing, so importing this module installs it."""

from tlt_verl.plugin import verl_plugin

verl_plugin()
