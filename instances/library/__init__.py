"""The instance files that ship with the package; `cbs_opt.instances.digits` makes them."""
