"""What the commands that run a model are asked for, before torch is imported."""

import pytest

from kmebench.cli import arguments
from kmebench.errors import ConfigError
from kmebench.planning.by_hand import fact
from kmebench.planning.workflow import reason


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("layers=[0,1]", [0, 1]),
        ("layers=0:1", [0, 1]),
        ("learning_rate=1e+0", 1.0),
        ("learning_rate=1e-4", 1e-4),
        ("norm_constraint=null", None),
        ("norm_constraint=None", None),
        ("second_moment=false", False),
        ("score=l2", "l2"),
        ("text=a=b", "a=b"),
    ],
)
def test_a_setting_is_read_as_yaml_and_as_a_folders_name(text, value):
    ((name, found),) = arguments.setting(text).items()
    assert (name, found, type(found)) == (text.partition("=")[0], value, type(value))


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("Building DAG of jobs...\nfetch_model: There is no x.\nRuleException:\nmore\n", "no x."),
        ("Building\nMissingRuleException:\nNo rule to produce x.\n", "No rule to produce x."),
        (
            'ConfigError in file "/a/common.smk", line 18:\nThe config is wrong.\n  File "x"\n',
            "The config is wrong.",
        ),
        ("LockException:\nError: locked.\nUse --unlock.\n", "Error: locked. Use --unlock."),
        ("something else\n", "something else"),
    ],
)
def test_why_the_workflow_failed_is_found_in_what_it_wrote(log, why):
    found = reason(log)
    assert found.endswith(why)
    assert "Building" not in found


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("France", "The capital of {} is", " "), "target is empty"),
        (("France", "The capital of {} is", "Ro\x07me"), "target holds a control character"),
        (("France", "The capital is", "Rome"), "prompt 'The capital is' holds no {}"),
    ],
)
def test_a_fact_that_cannot_be_edited_is_refused_in_the_words_of_the_command(values, said):
    with pytest.raises(ConfigError) as refused:
        fact(*values)
    assert said in str(refused.value)
    assert "target_new" not in str(refused.value)
