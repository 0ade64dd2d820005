"""Drafter training on devices that stand idle. In this version: what NVML says of the devices."""
