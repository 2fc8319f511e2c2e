"""Recipes that are refused, with file, line, table and key."""

from __future__ import annotations

import pytest

from auglocal_ext.cli import main
from auglocal_ext.training import SettingsError
from auglocal_ext.training.config import recipes
from auglocal_ext.training.config.recipes.toml_lines import line_of
from auglocal_ext.training.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[rule]\nrule = "dgl"\ndepht = 3\n', r"own.toml, line 3, \[rule\]: depht is unknown; did you mean depth\?"),
        ("[rule]\nlr = 3\n", r"line 2, \[rule\]: lr belongs in \[optimisation\]"),
        ("[rule]\nxyz = 3\n", r"line 2, \[rule\]: xyz is unknown; \[rule\] has rule, modules, depth"),
        (
            "[processes]\nstages = 2\ndelay = 1\n",
            r"line 3, \[processes\]: delay is no setting of a run, .*leave it out, or .* LocalStep\(.*delay=D\)",
        ),
        ("[step]\naccumulate = 4\n", r"line 2, .*: accumulate is no setting of a run: leave it out and take smaller"),
        ("[rule]\npadding-mode = 3\n", r"line 2, \[rule\]: padding-mode is unknown"),
        ("\n[training]\nlr = 3\n", r"line 2, \[training\] is no table of a recipe; tables are recipe, data"),
        ('[optimisation]\n# slow\nlr = "fast"\n', r'line 3, \[optimisation\]: lr expected a number, got "fast"'),
        ("[optimisation]\nlr = nan\n", r"lr expected a number, got nan"),
        ("[optimisation]\nepochs = 3.5\n", r"epochs expected a whole number, got 3.5"),
        ('[step]\nfused = "maybe"\n', r'line 2, \[step\]: fused expected true or false, got "maybe"'),
        ('[network]\nnetwork = ""\n', r'line 2, \[network\]: network expected text in quotes, got ""'),
        ("[rule]\nmodules = [3, 4.5]\n", r"modules expected a whole number or a list of whole numbers, got \[3, 4.5\]"),
        ("[augmentation]\nmean = []\n", r"mean expected a list of numbers, got \[\]"),
        ("[optimisation.sgd]\nlr = 3\n", r"\[optimisation\]: sgd is unknown"),
        ('[recipe]\nbase = "mine"\n', r'line 2, \[recipe\]: base expected auto or one of auglocal, .* got "mine"'),
        ("[recipe]\nbase = [1]\n", r"line 2, \[recipe\]: base expected auto or one of auglocal, .* got \[1\]"),
        ('[recipe]\nbases = "auto"\n', r"line 2, \[recipe\]: bases is unknown; did you mean base\?"),
        ("lr = 3\n", r"own.toml, line 1, \[lr\] is no table of a recipe"),
        ("step = 3\n", r"own.toml, line 1, \[step\] is a table, got 3"),
        ("[rule]\ndepth = 3\ndepth = 4\n", "own.toml: cannot be read as a recipe: .*line 3"),
        ("[rule]\nhead = 3\n", r"line 2, \[rule\]: head expected the name of a head, or a table \[rule.head\], got 3"),
        ('[rule]\nhead = "dgl:head=cnn"\n', r"line 2, \[rule\]: head .* has options: write a table \[rule.head\]"),
        (
            '[rule]\nrule = "man"\n[rule.head]\nrule = "auglocal"\ndepht = 3\n',
            r"own.toml, line 5, \[rule.head\]: depht is no option of auglocal; did you mean depth\?",
        ),
        (
            '[rule]\nrule = "man"\n[rule.head]\nrule = "man"\n[rule.head.head]\nrule = "predsim"\nbeta = "1"\n',
            r'own.toml, line 7, \[rule.head.head\]: beta expected a number, got "1"',
        ),
        ("[rule.head]\ndepth = 3\n", r"own.toml, line 1, \[rule.head\]: rule expected one of auglocal, .* got nothing"),
        (
            "[rule]\nrule = dgl\nmodules = 7, 15\n",
            r"own.toml: .*line 2.* It may be an INI file, and recipes are TOML: put",
        ),
        ("[rule]\nmodules = [7, 15\n", "own.toml: cannot be read as a recipe: Unclosed array"),
        ("[rule.head]\nrule = [1]\n", r"line 2, \[rule.head\]: rule expected one of auglocal, .* got \[1\]"),
        ('\n[rule]\nrule = "dni"\n', r"line 3, \[rule\]: rule is one of auglocal, .*, bp, not 'dni'"),
        ("[augmentation]\nmean = [1, 2]\n", r"line 2, \[augmentation\]: mean must be three numbers"),
        ("[augmentation]\nstd = [1, 0, 2]\n", r"line 2, \[augmentation\]: std must be three numbers above 0"),
        ("[augmentation]\npadding = -1\n", r"line 2, \[augmentation\]: padding must be at least 0, got -1"),
        ('[augmentation]\npadding_mode = "wrap"\n', r"line 2, .*: padding_mode is one of reflect, zero, not 'wrap'"),
        ("[optimisation]\nmomentum = 1\n", r"line 2, \[optimisation\]: momentum must lie between 0 and 1, got 1"),
        ("[processes]\nstages = 0\n", r"line 2, \[processes\]: stages must be at least 1, got 0"),
        ("[processes]\nreplicas = -2\n", r"line 2, \[processes\]: replicas must be at least 1, got -2"),
        ("[processes]\nstage_cuts = [4, 2]\n", r"line 2, .*: stage_cuts must be ascending numbers of local modules"),
        ('[step]\nmemory_budget = "lots"\n', r"line 2, \[step\]: memory_budget must be bytes, such as .* got 'lots'"),
        (f'[step]\nmemory_budget = "{"9" * 400}GB"\n', r"line 2, \[step\]: memory_budget must be bytes, such as"),
        ('[step]\ndevice = "gpu"\n', r"line 2, \[step\]: device is auto, cpu, cuda or cuda:<index>, not 'gpu'"),
        ('[network]\nnetwork = "resnet9"\n', r"line 2, .*: network names no network: unknown network 'resnet9', did"),
        ("[rule]\nmodules = 0\n", r"line 2, \[rule\]: modules must be at least 1, got 0"),
        ("[rule]\nmodules = [3, 3]\n", r"line 2, \[rule\]: modules must be ascending indices .* got \(3, 3\)"),
        ("[rule]\ndepth = 0\n", r"line 2, \[rule\]: depth \(.*\) is a whole number of at least 1; got 0"),
        ('[rule]\nrule = "auglocal"\npyramid = 1.5\n', r"line 3, \[rule\]: pyramid \(.*\) is a number within 0 .. 1"),
        ('[rule]\nrule = "dgl"\ndepth = 3\n', r"line 3, \[rule\]: depth belongs to the rule auglocal, not to dgl"),
        (
            '[rule]\nrule = "bp"\nmodules = 4\n',
            r"line 3, \[rule\]: modules belongs to the rule auglocal and .*, not to bp",
        ),
        ('[rule]\nrule = "bp"\nhead = "cnn"\n', r"line 3, \[rule\]: head belongs to the rule .*, not to bp"),
        ('[rule]\nrule = "infopro"\nweights = [1, 2]\n', r"line 3, \[rule\]: weights are four numbers, .* got 1,2"),
        ('[rule]\nrule = "dgl"\nhead = "conv"\n', r"line 3, \[rule\]: head is refused: unknown auxiliary head 'conv'"),
        (
            '[rule]\nrule = "man"\naverage_momentum = 2\n',
            r"line 3, \[rule\]: average_momentum \(.*; got 2",
        ),
        (
            '[rule]\nrule = "man"\n[rule.head]\nrule = "auglocal"\n\ndepth = 0\n',
            r"line 6, \[rule.head\]: depth \(.*\) is a whole number of at least 1; got 0",
        ),
        (
            '[rule]\nrule = "man"\nhead = { rule = "auglocal", depth = 0 }\n',
            r"line 3, \[rule.head\]: depth \(.*\) is a whole number of at least 1; got 0",
        ),
        (
            '[rule]\nrule = "predsim"\nbeta = 0.5\n[rule.head]\nrule = "contsup"\n',
            r"line 4, \[rule\]: head is refused: ContSup\(.* cannot be a head",
        ),
        (
            '[rule]\nrule = "auglocal"\nhead = "vgg"\nsingle_layer_norm = true\n',
            r"line 1, \[rule\] is refused: single_layer_norm puts a BatchNorm before the linear head's layer",
        ),
        ("[rule]\npyramid = 1" + "0" * 400, r"line 2, \[rule\]: pyramid expected a number, got 1000.*\.\.\. \(401"),
        (
            "[optimisation]\nepochs = 1" + "0" * 400,
            r"line 2, .*: epochs must be at most .*, got 1000.*\.\.\. \(401",
        ),
        ("[optimisation]\nepochs = 1" + "0" * 5000, r"own.toml, line 2: a number has more digits than Python reads"),
        (
            "[optimisation]\nlr = 0x1" + "0" * 5000,
            r"line 2, .*: lr expected a number, got a number of thousands",
        ),
        ("[rule]\nmodules = " + "[" * 3000, "own.toml: cannot be read as a recipe: its values are nested too deeply"),
    ],
    ids=lambda text: text[:40],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path, text, said):
    own = tmp_path / "own.toml"
    own.write_text(text)
    with pytest.raises(RecipeError, match=said) as refused:
        recipes.read(str(own))
    assert len(str(refused.value)) < 1500


def test_a_file_that_is_no_text_or_not_there(tmp_path):
    own = tmp_path / "own.toml"
    own.write_bytes(b"\xff\xfe[\x00")
    with pytest.raises(RecipeError, match="own.toml: cannot be read as a recipe: .*utf-8"):
        recipes.read(str(own))


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    own = tmp_path / "own.toml"
    own.write_bytes(b'\xef\xbb\xbf[rule]\r\nrule = "dgl"\r\n')
    assert recipes.read(str(own)).settings == {"rule": "dgl"}


def test_names_in_a_recipes_message_are_those_of_the_file(tmp_path, capsys):
    own = tmp_path / "own.toml"
    own.write_text("[optimisation]\nbatch-size = 3\n")
    assert main(["train", "--recipe", str(own), "--data", str(tmp_path)]) == 1
    assert "line 2, [optimisation]: batch-size is unknown; did you mean batch_size?" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"stages": 0}, {"memory_budget": "lots"}, {"modules": 0}, {"device": "gpu"}])
def test_python_refuses_the_same_values(config, wrong):
    with pytest.raises(SettingsError, match=f"^--{next(iter(wrong)).replace('_', '-')} (must|is)"):
        config(**{"rule": "dgl", **wrong})


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("rule",), 2),
        (("rule", "depth"), 3),
        (("rule", "head"), 6),
        (("rule", "head", "depth"), 7),
        (("rule", "head", "rule"), 6),
        (("step", "a b"), 9),
        (("step", "deep", "er"), 10),
        (("step", "none"), 8),
        (("data",), None),
    ],
)
def test_lines_of_keys(keys, line):
    text = (
        '# depth = 1\n[rule] # depth\n depth=2\nmodules = [\n  3]\n[ rule . "head" ]\r\ndepth = 3\r\n'
        '[step]\n"a b" = 1\ndeep.er = 2\n'
    )
    assert line_of(text, keys) == line


def test_a_recipe_that_is_not_there():
    with pytest.raises(
        SettingsError, match=r"--recipe inforpo: neither a recipe \(auglocal, .* did you mean infopro\?"
    ):
        recipes.read("inforpo")
    with pytest.raises(SettingsError, match=r"--recipe a{300}: neither a recipe"):  # too long a name for a file
        recipes.read("a" * 300)
