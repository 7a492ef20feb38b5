import stat

import pytest
from cryptography.fernet import Fernet

from core.errors import StorageError
from core.settings import Settings
from database.secrets import Secrets, ensure_secret_key, load_secrets
from tests.database.rows import in_threads


def test_a_new_key_in_front_still_opens_what_the_old_one_closed():
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    stored = Secrets(old).encrypt({"headers": {"Authorization": "Bearer x"}})
    assert Secrets(f"{new},{old}").decrypt(stored) == {"headers": {"Authorization": "Bearer x"}}
    with pytest.raises(StorageError):
        Secrets(new).decrypt(stored)
    assert Secrets(new).decrypt(Secrets(f"{new}, {old}").encrypt({"a": 1})) == {"a": 1}


def test_a_bad_key_is_refused_without_being_shown():
    with pytest.raises(ValueError, match="HONE_SECRET_KEY") as caught:
        Secrets("hunter2")
    assert "hunter2" not in str(caught.value)


def test_no_key_at_all_is_refused():
    with pytest.raises(ValueError, match="HONE_SECRET_KEY"):
        Secrets(" , ")


def test_the_key_file_is_made_once_and_only_its_owner_reads_it(tmp_path):
    settings = Settings(home=tmp_path / "home")
    with pytest.raises(StorageError, match="HONE_SECRET_KEY"):
        load_secrets(settings)
    in_threads([lambda: ensure_secret_key(settings)] * 4)
    path = settings.home / "secret_key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in settings.home.iterdir()] == ["secret_key"]
    stored = load_secrets(settings).encrypt({"a": 1})
    ensure_secret_key(settings)
    assert load_secrets(settings).decrypt(stored) == {"a": 1}


def test_a_key_from_the_environment_wins_and_nothing_is_written(tmp_path):
    settings = Settings(home=tmp_path, secret_key=Fernet.generate_key().decode())
    ensure_secret_key(settings)
    assert list(tmp_path.iterdir()) == []
    assert load_secrets(settings).decrypt(load_secrets(settings).encrypt({})) == {}
