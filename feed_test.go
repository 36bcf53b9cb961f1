package aegis_test

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
)

// startSlowLink starts a proxy in front of a server, which delivers everything that much later, and returns its address.
func startSlowLink(tb testing.TB, srv *server.Server, latency time.Duration) string {
	tb.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = listener.Close() })
	delay := func(to, from net.Conn) {
		type chunk struct {
			data []byte
			due  time.Time
		}
		chunks := make(chan chunk, 1024)
		go func() {
			defer close(chunks)
			for {
				buf := make([]byte, 32<<10)
				n, err := from.Read(buf)
				if err != nil {
					return
				}
				chunks <- chunk{buf[:n], time.Now().Add(latency)}
			}
		}()
		for c := range chunks {
			time.Sleep(time.Until(c.due))
			if _, err := to.Write(c.data); err != nil {
				break
			}
		}
		_ = to.Close()
		_ = from.Close()
		for range chunks { // until the reader has ended
		}
	}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			backend, err := net.Dial("tcp", srv.Addr().String())
			if err != nil {
				_ = client.Close()
				return
			}
			go delay(backend, client)
			go delay(client, backend)
		}
	}()
	return listener.Addr().String()
}

// A handler of commands asks JetStream some twenty questions when it starts. Over a slow link, or on a busy machine, that takes longer
// than the time limit of one question.
func TestStartOverSlowLink(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	link := startSlowLink(t, srv, 130*time.Millisecond)
	svc := newService(t, srv, "risk", aegis.WithURL("nats://"+link))
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) { return c.Data + 1, nil })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := svc.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if r := wait(t, send[int, int](t, newService(t, srv, "shop"), "risk", "work", 1)); r != 2 {
		t.Errorf("got %d, want 2", r)
	}
}
