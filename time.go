package aegis

import (
	"context"
	mrand "math/rand/v2"
	"strconv"
	"time"
)

// This file has the clock, pauses, deadlines, and the durations in the headers of the server.

// clock returns the monotonic time since the process began. "By the clock" in a comment means that a time is measured so.
func clock() time.Duration { return time.Since(clockStart) }

var clockStart = time.Now()

// backoff returns the pause after attempt n, which is random between 0 and first·2ⁿ⁻¹, and at most longest.
func backoff(n int, first, longest time.Duration) time.Duration {
	d := longest
	if n = max(n, 1); n < 64 && first <= longest>>(n-1) {
		d = first << (n - 1)
	}
	return mrand.N(d + 1)
}

// sleep pauses for d. It reports false if ctx ends before d is over.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// withDeadline returns ctx, with a timeout of d if it has no deadline.
func withDeadline(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, timeLeft(ctx, d))
}

// timeLeft returns the time until ctx ends, or usual if ctx has no deadline.
func timeLeft(ctx context.Context, usual time.Duration) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		usual = time.Until(deadline)
	}
	return min(usual, maxBudget)
}

const maxBudget = 365 * 24 * time.Hour // more might not fit into the reply subject, or overflow the clock

// seconds returns a duration in the form of the server's headers, rounded up to whole seconds.
func seconds(d time.Duration) string {
	return strconv.FormatInt(int64((d+time.Second-1)/time.Second), 10) + "s"
}

// parseTTL returns the time in a Nats-TTL header, which the server has checked: a duration, or a number of seconds. It is 0 if
// the message does not expire.
func parseTTL(header string) time.Duration {
	if seconds, err := strconv.ParseInt(header, 10, 32); err == nil {
		return time.Duration(seconds) * time.Second
	}
	ttl, _ := time.ParseDuration(header)
	return ttl
}
