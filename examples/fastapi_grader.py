"""A grader in FastAPI: GRADER_SECRET=whsec_... uvicorn examples.fastapi_grader:app --port 9000"""

import os

from fastapi import FastAPI, HTTPException, Request
from standardwebhooks import Webhook, WebhookVerificationError

app = FastAPI()
webhook = Webhook(os.environ["GRADER_SECRET"])


@app.post("/")
async def score(request: Request) -> dict[str, float]:
    try:
        call = webhook.verify(await request.body(), dict(request.headers))
    except WebhookVerificationError as error:
        raise HTTPException(401, "wrong signature") from error
    return {"score": 1.0 if call["sample"]["output_text"].strip() == call["item"]["answer"] else 0.0}
