"""torch's build of an extension, which compiles those sources alone that no kept object belongs to."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setuptools import Extension
from torch.utils.cpp_extension import BuildExtension


class ReusingBuild(BuildExtension):  # type: ignore[misc]
    """``objects`` keeps what was compiled. ``key`` gives the name of a source's object, made from how it is compiled;
    ``progress`` makes the reporter for the sources that are left."""

    objects: Any
    key: Callable[[str, Any], str]
    progress: Callable[[list[str]], Any]
    say: Callable[[str], None]

    def build_extension(self, ext: Extension) -> None:
        compiler = self.compiler
        compile_with_torch = compiler.compile

        def compile_missing(sources: list[str], output_dir: str, **options: Any) -> list[str]:
            folder = os.path.abspath(output_dir)
            # What ninja left there was made by unknown compilers from unknown headers; it looks at times alone.
            shutil.rmtree(folder, ignore_errors=True)
            files = dict(zip(sources, map(Path, compiler.object_filenames(sources, output_dir=folder)), strict=True))
            # A copy, because torch adds to the flags that it is given.
            flags = copy.deepcopy([compiler.compiler_so, options.get("macros"), options.get("extra_postargs")])
            keys = {source: self.key(source, flags) for source in sources}
            missing = [source for source in sources if not self.objects.take(keys[source], files[source])]
            if len(missing) < len(sources):
                self.say(f"auglocal_ext: {len(sources) - len(missing)} of {len(sources)} files are compiled already")
            if missing:
                made_from = {str(files[source]): source for source in missing}

                def finished(file: str) -> None:
                    source = made_from.pop(file, None)
                    # Not if it was edited meanwhile: nobody knows which of the two texts the compiler has read.
                    if source is not None and self.key(source, flags) == keys[source]:
                        self.objects.keep(keys[source], Path(file))

                progress = self.progress(missing)
                progress.start()
                with progress.watched(Path(folder, ".ninja_log"), finished):
                    compile_with_torch(missing, output_dir=output_dir, **options)
                for file in list(made_from):  # without ninja
                    finished(file)
            return [str(file) for file in files.values()]

        compiler.compile = compile_missing
        super().build_extension(ext)
