"""When the grader of a job that paused for it is probed next."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

WAITING = sa.text("status = 'paused' AND pause_reason = 'grader_unavailable'")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("probes", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("probe_at", sa.Double(), nullable=True))
    op.create_index("ix_jobs_probe", "jobs", ["probe_at"], sqlite_where=WAITING, postgresql_where=WAITING)


def downgrade() -> None:
    op.drop_index("ix_jobs_probe", "jobs")
    op.drop_column("jobs", "probe_at")
    op.drop_column("jobs", "probes")
