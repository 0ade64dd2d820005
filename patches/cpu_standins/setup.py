"""Everything stands in setup.cfg; this adds the one file that setuptools has no key for, the .pth at the wheel's
top."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPth(build_py):
    """Puts `tlt_torchvision_ops.pth` beside the packages, where the interpreter reads it at start-up."""

    def run(self):
        """Build as usual, then add the file."""
        super().run()
        target = Path(self.build_lib) / "tlt_torchvision_ops.pth"
        target.write_text("import tlt_torchvision_ops\n")


setup(cmdclass={"build_py": BuildWithPth})
