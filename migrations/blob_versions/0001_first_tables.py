"""The first tables of the blobs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_blob_chunks()
    _create_blob_garbage()
    _create_blob_manifests()
    _create_blob_chunk_refs()
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE blob_chunks ALTER COLUMN data SET STORAGE EXTERNAL")


def downgrade() -> None:
    op.drop_table("blob_chunk_refs")
    op.drop_table("blob_manifests")
    op.drop_table("blob_garbage")
    op.drop_table("blob_chunks")


def _create_blob_chunks() -> None:
    op.create_table(
        "blob_chunks",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=True),
        sa.Column("object_key", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("digest", name="pk_blob_chunks"),
    )


def _create_blob_garbage() -> None:
    op.create_table(
        "blob_garbage",
        sa.Column("object_key", sa.Text(), nullable=False),
        sa.Column("not_before", sa.Double(), nullable=False),
        sa.Column("is_claimed", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("object_key", name="pk_blob_garbage"),
    )


def _create_blob_manifests() -> None:
    op.create_table(
        "blob_manifests",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_blob_manifests"),
    )
    op.create_index("ix_blob_manifests_status_created_at", "blob_manifests", ["status", "created_at"], unique=False)


def _create_blob_chunk_refs() -> None:
    op.create_table(
        "blob_chunk_refs",
        sa.Column("manifest_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["blob_chunks.digest"], name="fk_blob_chunk_refs_digest"),
        sa.ForeignKeyConstraint(["manifest_id"], ["blob_manifests.id"], name="fk_blob_chunk_refs_manifest_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("manifest_id", "position", name="pk_blob_chunk_refs"),
    )
    op.create_index("ix_blob_chunk_refs_digest", "blob_chunk_refs", ["digest"], unique=False)
