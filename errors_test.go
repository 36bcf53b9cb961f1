package aegis_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"github.com/aegistrader/aegis"
)

func TestHandlerErrors(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	noFunds := &aegis.Error{Code: "NO_FUNDS", Message: "balance is 3", Details: map[string]string{"balance": "3"}, NotRun: true}
	for method, fn := range map[string]func() error{
		"own":      func() error { return noFunds },
		"wrapped":  func() error { return fmt.Errorf("order 7: %w", noFunds) },
		"sentinel": func() error { return fmt.Errorf("order 7: %w", aegis.ErrNotFound) },
		"plain":    func() error { return errors.New("disk full") },
		"deadline": func() error { return fmt.Errorf("reading: %w", context.DeadlineExceeded) },
		"nil":      func() error { return (*aegis.Error)(nil) },
		"panic":    func() error { panic("boom") },
		"index":    func() error { return []error{}[len(os.Args)] },
		"goexit":   func() error { runtime.Goexit(); return nil },
	} {
		handle(t, svc, method, func(context.Context, int) (int, error) { return 0, fn() }, aegis.Concurrency(1))
	}
	handle(t, svc, "unencodable", func(context.Context, int) (chan int, error) { return nil, nil })
	start(t, svc)
	client := newService(t, srv, "client")
	for range 3 { // a method still serves after its handler has panicked
		for _, c := range []struct{ method, code, message, text string }{
			{"own", "NO_FUNDS", "balance is 3", "svc: NO_FUNDS: balance is 3"},
			{"wrapped", "NO_FUNDS", "order 7: balance is 3", "svc: NO_FUNDS: order 7: balance is 3"},
			{"sentinel", "NOT_FOUND", "order 7", "svc: NOT_FOUND: order 7"},
			{"plain", "INTERNAL", "disk full", "svc: INTERNAL: disk full"},
			{"deadline", "DEADLINE_EXCEEDED", "reading: context deadline exceeded", "svc: DEADLINE_EXCEEDED: reading: context deadline exceeded"},
			{"nil", "INTERNAL", "the handler returned a nil *aegis.Error", ""},
			{"panic", "INTERNAL", "panic in panic: boom", "svc: INTERNAL: panic in panic: boom"},
			{"index", "INTERNAL", "panic in index: runtime error: index out of range", ""},
			{"goexit", "INTERNAL", "panic in goexit: the handler called runtime.Goexit", "svc: INTERNAL: panic in goexit: the handler called runtime.Goexit"},
		} {
			_, err := call[int, int](client, "svc", c.method, 1)
			e := fails(t, err, &aegis.Error{Code: c.code})
			if !strings.HasPrefix(e.Message, c.message) || c.text != "" && e.Error() != c.text || e.Source != "svc" || e.NotRun || e.Cause != nil {
				t.Errorf("%s: got %+v, %q", c.method, *e, e)
			}
			if strings.Contains(c.code, "FUNDS") && !reflect.DeepEqual(e.Details, noFunds.Details) {
				t.Errorf("%s: details %v", c.method, e.Details)
			}
		}
		_, err := call[int, int](client, "svc", "unencodable", 1)
		fails(t, err, aegis.ErrInternal, "unencodable")
	}
	if !noFunds.NotRun || noFunds.Source != "" {
		t.Errorf("the handler's error was changed: %+v", noFunds)
	}
	if errors.Is(noFunds, aegis.ErrNotFound) || !errors.Is(&aegis.Error{Code: "NOT_FOUND"}, aegis.ErrNotFound) {
		t.Error("errors.Is does not compare codes")
	}
}

func TestErrorChainOverThreeHops(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	a, b, c := newService(t, srv, "a"), newService(t, srv, "b"), newService(t, srv, "c")
	handle(t, c, "m", func(context.Context, int) (int, error) {
		return 0, &aegis.Error{Code: "NO_FUNDS", Message: "balance is 3"}
	})
	handle(t, b, "wrap", func(ctx context.Context, n int) (int, error) {
		n, err := aegis.Call[int, int](ctx, b, "c", "m", n)
		return n, fmt.Errorf("reserving: %w", err)
	})
	handle(t, b, "pass", func(ctx context.Context, n int) (int, error) {
		return aegis.Call[int, int](ctx, b, "c", "m", n)
	})
	handle(t, b, "nowhere", func(ctx context.Context, n int) (int, error) {
		return aegis.Call[int, int](ctx, b, "d", "m", n)
	})
	for _, via := range []string{"wrap", "pass", "nowhere"} {
		handle(t, a, via, func(ctx context.Context, n int) (int, error) {
			n, err := aegis.Call[int, int](ctx, a, "b", via, n)
			return n, fmt.Errorf("order 7: %w", err)
		})
	}
	for _, s := range []*aegis.Service{a, b, c} {
		start(t, s)
	}
	client := newService(t, srv, "client")
	sources := func(err error) (s []string) {
		var e *aegis.Error
		for errors.As(err, &e) {
			s, err = append(s, e.Source), e.Unwrap()
		}
		return s
	}

	_, err := call[int, int](client, "a", "wrap", 1)
	fails(t, err, &aegis.Error{Code: "NO_FUNDS"})
	if got := err.Error(); got != "a: NO_FUNDS: order 7: b: NO_FUNDS: reserving: c: NO_FUNDS: balance is 3" {
		t.Errorf("got %q", got)
	}
	if got := sources(err); !reflect.DeepEqual(got, []string{"a", "b", "c"}) {
		t.Errorf("got sources %v", got)
	}

	_, err = call[int, int](client, "a", "pass", 1)
	if got := err.Error(); got != "a: NO_FUNDS: order 7: b: c: NO_FUNDS: balance is 3" {
		t.Errorf("got %q", got)
	}
	if got := sources(err); !reflect.DeepEqual(got, []string{"a", "b", "c"}) {
		t.Errorf("got sources %v", got)
	}

	_, err = call[int, int](client, "a", "nowhere", 1)
	e := fails(t, err, aegis.ErrUnavailable, "d is not running")
	if e.NotRun {
		t.Error("NotRun = true, want false: the handler of a ran")
	}
	if !errors.Is(err, aegis.ErrUnavailable) {
		t.Error("errors.Is(err, ErrUnavailable) = false, want true")
	}
}
