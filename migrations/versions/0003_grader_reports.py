"""Reports about graders, and the words of a grade that failed."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("samples", sa.Column("error_message", sa.Text(), nullable=True))
    op.create_table(
        "grader_reports",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("grader_id", sa.Text(), nullable=False),
        sa.Column("grader_version", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("request", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("lease_token", sa.Text(), nullable=True),
        sa.Column("lease_expires_at", sa.Double(), nullable=True),
        sa.Column("passed", sa.Boolean(), nullable=True),
        sa.Column("summary", sa.Text(), nullable=True),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_grader_reports_project_id"),
        sa.ForeignKeyConstraint(["grader_id"], ["graders.id"], name="fk_grader_reports_grader_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_grader_reports"),
    )
    op.create_index("ix_grader_reports_grader_id_created_at_id", "grader_reports", ["grader_id", "created_at", "id"], unique=False)
    open_only = sa.text("finished_at IS NULL")
    op.create_index(
        "ix_grader_reports_open", "grader_reports", ["created_at"], unique=False, sqlite_where=open_only, postgresql_where=open_only
    )


def downgrade() -> None:
    op.drop_table("grader_reports")
    op.drop_column("samples", "error_message")
